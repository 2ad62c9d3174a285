"""TransformerEngine's layers as shapes, for a plan: they hold and allocate what its kernels do.

Megatron's own wrappers build and call them, so that flags, names and sizes are those of a GPU run.
What is saved for backward is TransformerEngine 2.20's in bf16. Nothing here imports Megatron.
"""
