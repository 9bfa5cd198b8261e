"""The study's questions, each with figure, table and answer from committed results.

A notebook of `notebooks/` asks one; `python -m experiments.questions` remakes every figure.
"""
