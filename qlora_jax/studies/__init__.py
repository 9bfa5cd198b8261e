"""Studies: arms and trials, search and final stages, workers, tables, protocol, statistics."""
