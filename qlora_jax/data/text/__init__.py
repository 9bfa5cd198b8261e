"""Instruction data: data sets, chat formatting, packing, the Grain pipeline and scoring."""
