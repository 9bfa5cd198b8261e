"""Runs on clusters: Slurm jobs, TPU slices, and what a work directory's settings are doing."""
