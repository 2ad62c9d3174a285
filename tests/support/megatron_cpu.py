"""Megatron on the CPU, imported once by the server that test processes are forked from."""

import argparse
import functools
import gc
import os
import sys

import torch

import megalora.cpu
import tests.support.mamba_on_cpu

if "TEST_TRANSFORMER_ENGINE" not in os.environ:
    # As for every run on the CPU; set it for the tests of its layers, and for no others.
    sys.modules.setdefault("transformer_engine", None)  # type: ignore[arg-type]
megalora.cpu.install()
tests.support.mamba_on_cpu.install()
torch.set_num_threads(1)

# It imports transformers, which takes longer than all the rest of a small run.
import megatron.core.tokenizers.text  # noqa: E402
import megatron.training.training  # noqa: E402, F401
from megatron.training.argument_utils import ArgumentGroupFactory  # noqa: E402
from megatron.training.arguments import add_megatron_arguments  # noqa: E402

import megalora.builder  # noqa: E402
import megalora.checkpoint.base  # noqa: E402
import megalora.checkpoint.save  # noqa: E402
import megalora.hf.exchange  # noqa: E402
import megalora.plan.child  # noqa: E402
import megalora.run  # noqa: E402
from megalora.ops.fused import load  # noqa: E402

load()

# Megatron reads the helps of its flags out of its source, which takes longer than a tiny run's
# training: do so once, before ranks are forked.
read_docstrings = functools.partial(
    ArgumentGroupFactory._get_field_docstrings, ArgumentGroupFactory
)
ArgumentGroupFactory._get_field_docstrings = staticmethod(functools.cache(read_docstrings))
add_megatron_arguments(argparse.ArgumentParser())

# No rank need look through all that was imported for garbage, nor copy its pages by counting.
gc.collect()
gc.freeze()
