"""Queryable LoRA in JAX and Flax: a shared, routed memory of low-rank update atoms."""

__version__ = "0.1.0"
