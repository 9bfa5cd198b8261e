"""Training: the one loop, the step, the optimizer, checkpoints, metrics, progress and stopping."""
