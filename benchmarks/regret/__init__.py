"""The experiments of "LoRA Without Regret" at toy size, through megalora and Megatron."""
