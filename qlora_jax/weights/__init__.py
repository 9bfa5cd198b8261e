"""Readers of pretrained weights and the writer of trained adapters.

sources             `open_source(name_or_path)`: one interface over all kinds of weights
source              the interface of every source
safetensors_source  a Hugging Face folder, single or sharded safetensors
gguf_header         the header of a GGUF file: metadata and the table of its tensors
gguf_layout         GGUF names, layouts and metadata as Hugging Face names, layouts and config
gguf_source         a GGUF file
tokenizer           converts text to token ids; from tokenizer.json or from GGUF metadata
gguf_vocabulary     builds the tokenizer that GGUF metadata describe
chat                chat templates, rendered in a sandbox
adapter_file        a trained adapter as one folder, saved whole or not at all
"""
