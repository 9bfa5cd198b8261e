"""Queryable LoRA against LoRA on other frozen networks: see README.md."""
