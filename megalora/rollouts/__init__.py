"""Answers sampled from a policy: by Megatron's own inference engine, by vLLM, or by SGLang."""
