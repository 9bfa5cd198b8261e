"""Instruction x routing x truth on `multi_target`: `python -m experiments.factorial`."""
