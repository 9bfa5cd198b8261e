"""Noisy-regression data: functions, noise, TFDS builders, instructions and the Grain reader."""
