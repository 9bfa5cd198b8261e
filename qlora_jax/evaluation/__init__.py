"""Evaluation: the statistics that the study rests on."""
