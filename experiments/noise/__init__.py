"""Queryable LoRA against LoRA by noise and number of training rows: see README.md."""
