"""Backbones with an adapter slot in every linear map. These files only assemble."""
