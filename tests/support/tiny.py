"""Flags of tiny models, and what to compare of their checkpoints."""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from tests.support.forked import SCRIPT, Ranks

MODEL = shlex.split("""
--num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 4
--group-query-attention --num-query-groups 2 --kv-channels 16 --qk-layernorm --swiglu
--normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
--position-embedding-type rope --vocab-size 255 --make-vocab-size-divisible-by 64
--seq-length 16 --max-position-embeddings 16
--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm
--no-bias-swiglu-fusion --no-rope-fusion --no-masked-softmax-fusion
--attention-dropout 0 --hidden-dropout 0
""")
EXPERTS = shlex.split("""
--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32
--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none
""")
# All kinds of layers.
HYBRID = shlex.split("""
--hybrid-layer-pattern M*-E
--mamba-state-dim 12 --mamba-head-dim 8 --mamba-num-heads 8 --mamba-num-groups 2
""")
TRAIN = shlex.split("""
--micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --clip-grad 1.0
--log-interval 1 --eval-iters 0 --eval-interval 1000 --num-workers 0 --save-interval 3
--calculate-per-token-loss
""")
LORA = ["--lora-rank", "8"]
ASYNC = ["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore"]


def flags(text: str) -> list[str]:
    """Return the flags of a parallel layout written short, such as `tp2 sp pp2 ep2 etp1 vpp1`."""
    names = {
        "tp": "--tensor-model-parallel-size",
        "pp": "--pipeline-model-parallel-size",
        "ep": "--expert-model-parallel-size",
        "etp": "--expert-tensor-parallel-size",
        "vpp": "--num-layers-per-virtual-pipeline-stage",
    }
    switches = {"sp": "--sequence-parallel", "do": "--use-distributed-optimizer"}
    found = []
    for part in text.split():
        if part in switches:
            found.append(switches[part])
        elif part != "dp":
            name = part.rstrip("0123456789")
            found += [names[name], part.removeprefix(name)]
    return found


def train(
    world_size: int,
    directory: Path,
    *more: object,
    model: list[str] = MODEL,
    iters: int = 6,
    script: Path = SCRIPT,
    env: Mapping[str, str] | None = None,
) -> Ranks:
    """Start a run that saves in directory and resumes from it."""
    saved = ["--save", directory, "--load", directory, "--train-iters", iters]
    logs = directory.parent / f"{directory.name}-logs"
    shutil.rmtree(logs, ignore_errors=True)
    return Ranks(world_size, [*model, *TRAIN, *saved, *more], logs, script=script, env=env)


def back_to(source: Path, target: Path, iteration: int) -> Path:
    """Copy a directory of checkpoints as it was at an iteration."""
    target.mkdir()
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, target / name)
    (target / "latest_checkpointed_iteration.txt").write_text(str(iteration))
    return target


def read_all(directory: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Read the adapters and, unsharded, all tensors of the optimizer."""
    from megalora.checkpoint.read import read_tensors

    return read_tensors(directory / f"iter_{iteration:07d}", lambda key: True)


def same_tensors(one: Path, other: Path, iteration: int) -> list[str]:
    """Return the names of all tensors of a checkpoint; assert that they equal another's bitwise."""
    first, second = read_all(one, iteration), read_all(other, iteration)
    assert first.keys() == second.keys()
    different = [key for key in first if not first[key].equal(second[key])]
    assert not different, different
    return sorted(first)
