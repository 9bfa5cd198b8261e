"""Launching on clusters: Slurm jobs, TPU slices, and the status of the arms of a work directory."""
