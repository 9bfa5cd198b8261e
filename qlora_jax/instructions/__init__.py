"""Frozen sentence encoders for instructions, their disk cache and their frozen projection.

encoders    one interface over the encoders, `create(name)`
minilm      all-MiniLM-L6-v2, a BERT forward pass in JAX
wordllama   the mean of static token vectors, in NumPy
wheels      paths and hashes of the encoders' files
cache       `embed(texts)`: encodes every text once per machine
projection  centred PCA to the instruction width E of the adapter
"""
