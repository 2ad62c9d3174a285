"""Large models at hundreds and thousands of ranks, built and run for a step on shapes alone."""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import pytest

from megalora.config import LoRAConfig
from megalora.model.megatron import megatron_flags
from megalora.model.presets import PRESETS, preset_shape
from megalora.recommend.costs import adapter_parameters
from tests.support import forked
from tests.support.plans import in_a_world

RANK = 32
RUN = (
    *("--tokenizer-type", "NullTokenizer", "--seq-length", "4096", "--max-position-embeddings"),
    *("4096", "--micro-batch-size", "1", "--lr", "1e-4", "--train-iters", "10"),
    *("--eval-iters", "0", "--eval-interval", "100", "--bf16", "--use-distributed-optimizer"),
    *("--sequence-parallel", "--transformer-impl", "local", "--no-masked-softmax-fusion"),
    *("--no-persist-layer-norm", "--lora-rank", str(RANK)),
)


class Job(NamedTuple):
    """A model on a cluster, cut into stages of which all but the first and the last are alike."""

    model: str
    world_size: int
    tp: int
    pp: int
    ep: int = 1
    flags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.model} on {self.world_size}"

    @property
    def argv(self) -> list[str]:
        """Return the flags; a step has as few microbatches as there can be, one."""
        return [
            *megatron_flags(PRESETS[self.model]),
            *RUN,
            *("--tensor-model-parallel-size", str(self.tp)),
            *("--pipeline-model-parallel-size", str(self.pp)),
            *("--expert-model-parallel-size", str(self.ep), "--expert-tensor-parallel-size"),
            *(str(1 if self.ep > 1 else self.tp), "--global-batch-size"),
            *(str(self.world_size // self.tp // self.pp), *self.flags),
        ]

    def rank_of(self, stage: int) -> int:
        """Return the last rank of a stage."""
        return self.world_size // self.pp * (stage + 1) - 1


DEEPSEEK = ("--decoder-first-pipeline-num-layers", "3", "--decoder-last-pipeline-num-layers", "2")
LLAMA = ("--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split")
ON_512 = {
    "qwen3-30b-a3b": Job("qwen3-30b-a3b", 512, tp=4, pp=4, ep=32),
    "llama-3.1-405b": Job("llama-3.1-405b", 512, tp=8, pp=16, flags=LLAMA),
    "deepseek-v3": Job("deepseek-v3", 512, tp=4, pp=16, ep=32, flags=DEEPSEEK),
}
ON_4096 = {
    model: job._replace(world_size=4096, ep=min(4 * job.ep, 128) if job.ep > 1 else 1)
    for model, job in ON_512.items()
}
# Parameters of the models' files; DeepSeek's without the layer that predicts one token more, and
# without the biases of its routers, which are no parameters in Megatron.
PUBLISHED = {
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3.1-405b": 405_853_388_800,
    "deepseek-v3": 671_026_419_200 - 58 * 256,
}


def elements_of_a_stage(
    rank: int, world_size: int, argv: Sequence[str], tp: int, ep: int
) -> Counter[str]:
    """Build a rank and run a step; return its stage's parameters, over all ranks that share it."""
    from megalora.plan.meter import Meter
    from megalora.plan.processes import OWN_SCRIPT
    from megalora.plan.script import Built, build
    from megalora.plan.step import run_step

    found: Counter[str] = Counter()

    def use(built: Built) -> None:
        for chunk in built.model:
            for parameter in chunk.parameters():
                assert parameter.is_meta
                copies = tp if getattr(parameter, "tensor_model_parallel", False) else 1
                # Megatron's sign of experts.
                copies = copies if getattr(parameter, "allreduce", True) else ep
                kind = "trained" if parameter.requires_grad else "frozen"
                found[kind] += parameter.numel() * copies
        step = run_step(built.model, built.optimizer, built.args, Meter())
        assert 0 < step.before < step.peak

    with in_a_world(rank, world_size):
        build(OWN_SCRIPT, argv, use)
    return found


@functools.cache
def elements(job: Job, stage: int) -> Counter[str]:
    rank = job.rank_of(stage)
    return forked.call(elements_of_a_stage, rank, job.world_size, job.argv, job.tp, job.ep)


@pytest.mark.parametrize("model", PUBLISHED)
def test_all_stages_together_are_the_model_and_its_adapters(model: str) -> None:
    job = ON_512[model]
    stages = {0: 1, 1: job.pp - 2, job.pp - 1: 1}
    total = {
        kind: sum(number * elements(job, stage)[kind] for stage, number in stages.items())
        for kind in ("frozen", "trained")
    }
    shape = preset_shape(model)
    # Megatron pads the vocabulary, of the embedding and of the unembedding.
    padding = -shape.vocab_size % (128 * job.tp)
    padded = replace(shape, vocab_size=shape.vocab_size + padding)
    assert total["trained"] == sum(adapter_parameters(padded, LoRAConfig(rank=RANK)).values())
    assert total["frozen"] == PUBLISHED[model] + 2 * padding * shape.hidden_size


@pytest.mark.parametrize("model", PUBLISHED)
def test_eight_times_the_ranks_have_the_same_stages(model: str) -> None:
    job, last = ON_4096[model], ON_4096[model].pp - 1
    assert elements(job, last) == elements(ON_512[model], last)
