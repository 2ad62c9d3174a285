"""Megatron on the CPU, imported once by the server that test processes are forked from."""

import torch

import megalora.cpu
import tests.mamba_on_cpu

megalora.cpu.install()
tests.mamba_on_cpu.install()
torch.set_num_threads(1)

# It imports transformers, which takes longer than all the rest of a small run.
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.training  # noqa: E402, F401

import megalora.base_weights  # noqa: E402
import megalora.builder  # noqa: E402
import megalora.exchange  # noqa: E402
import megalora.run  # noqa: E402
import megalora.saving  # noqa: E402
