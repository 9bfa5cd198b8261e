"""The studies, one file each: its question, config, tables, figure and claims."""
