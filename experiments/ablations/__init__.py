"""The routing taken apart, one thing at a time: `python -m experiments.ablations`."""
