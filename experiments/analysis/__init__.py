"""Analysis of single studies where it is too long for the file in `experiments/studies`."""
