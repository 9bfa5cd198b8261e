"""Backbones with an adapter slot in every linear map; the files of the models only assemble."""
