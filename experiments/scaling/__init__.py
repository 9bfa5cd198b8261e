"""What Queryable LoRA's shared memory costs beyond LoRA at 8B, 70B and 405B parameters."""
