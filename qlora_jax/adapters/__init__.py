"""Adapters: Queryable LoRA (arXiv 2605.08423), its baselines and its controls, in one slot."""
