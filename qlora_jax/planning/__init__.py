"""Plans: memory, collectives and time of a training step on TPUs, without having any TPU."""
