"""What a training step would take on a TPU pod, found out on a machine without TPUs."""
