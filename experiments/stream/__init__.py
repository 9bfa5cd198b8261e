"""A stream of tasks: forgetting and forward transfer, with frozen atoms and with free ones."""
