"""The example's own preference optimization of a model, in any layout: what each step was like."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from examples.dpo_lora import batches, loss
from megalora.builder import apply_lora
from megalora.config import LoRAConfig
from megalora.data.preferences import Pair
from megalora.hf.adapters import to_hf
from megalora.hf.exchange import load_adapter
from megalora.model.config_json import model_shape, read_config
from megalora.policy.policy import Policy
from tests.dist.support import hf
from tests.dist.support.layouts import Layout, model_parallel
from tests.dist.support.parity import assemble
from tests.dist.support.training import Run, Trainer

BETA, LR, EPS = 0.3, 1e-2, 1e-3


class Steps(NamedTuple):
    """Of each step its metrics, means over pairs, and the norm of its gradient.

    gradients: of the first step, before they are clipped, where each rank has all of its own.
    end: the adapters after the last one.
    """

    metrics: list[dict[str, float]]
    norms: list[float]
    gradients: dict[str, Tensor]
    end: dict[str, Tensor]


def take_steps(
    layout: Layout,
    chunks: list[Any],
    pairs: Sequence[Pair],
    *,
    num_steps: int,
    size: int,
    overlap: bool = False,
) -> Steps:
    """Train in each step on this rank's pairs, `size` in a microbatch.

    overlap: with a distributed optimizer whose collectives overlap with computing.
    """
    run = Run(lr=LR, adam_eps=EPS, distributed_optimizer=overlap, overlap=overlap)
    trainer = Trainer(chunks, layout, run)
    unused: Any = None
    policy = Policy(trainer.models, trainer.optimizer, unused)
    found = Steps([], [], {}, {})
    take = trainer.optimizer.step

    def watched() -> Any:
        if not found.gradients and not overlap:
            found.gradients.update(assemble(chunks, lambda factor: factor.main_grad))
        return take()

    trainer.optimizer.step = watched
    part = functools.partial(loss, beta=BETA, label_smoothing=0.0, num_pairs=len(pairs))
    num_pairs = len(pairs) * parallel_state.get_data_parallel_world_size()
    for _ in range(num_steps):
        step = policy.step(batches(policy, pairs, size), part)
        found.metrics.append({name: total / num_pairs for name, total in step.metrics.items()})
        found.norms.append(step.grad_norm)
    found.end.update(assemble(chunks, torch.Tensor.detach))
    return found


def from_hugging_face(base: Path, adapter: Path, pairs: Sequence[Pair]) -> Steps:
    """Train a model and its adapter of Hugging Face's on one rank; names are Hugging Face's too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    shape = model_shape(read_config(base))
    config = LoRAConfig(rank=8, alpha=16.0, targets=("attn", "mlp"))
    alone, padded = Layout(), -(-shape.vocab_size // 8) * 8
    with model_parallel(alone):
        chunks = hf.load(alone, base, padded_vocab=padded)
        apply_lora(chunks, config, vocab_size=shape.vocab_size)
        load_adapter(chunks, adapter, config, hf_model=str(base))
        found = take_steps(alone, chunks, pairs, num_steps=3, size=len(pairs))

    def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        factors = to_hf(tensors, config, shape).items()
        both = ("lora_A", "lora_B")
        return {f"{name}.{one}": getattr(f, one).clone() for name, f in factors for one in both}

    return found._replace(gradients=renamed(found.gradients), end=renamed(found.end))
