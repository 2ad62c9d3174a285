"""A pretrained model on real text: from a Hugging Face directory to a trained Megatron model.

The text is that of the examples, `--dataset stdlib-docstrings`: what does a function do? what its
docstring says, in the model's own tokens, several answers packed into a row.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from statistics import mean
from time import process_time
from typing import cast

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.regret.job import HELD_OUT_ROWS, Job, Norms, Precision, Result
from benchmarks.regret.model import Trainer
from megalora import LoRAConfig, cpu
from megalora.adapters.bases import base_linears
from megalora.checkpoint.gather import gather_adapters
from megalora.data import PackedDataset, build_datasets
from megalora.data.batch import block_diagonal_mask
from megalora.hf.adapters import to_hf
from megalora.hf.base import load_hf_base
from megalora.hf.inspect import measure_all
from megalora.hf.one_process import build_base
from megalora.hf.rotary import set_rotary
from megalora.hf.safetensors_files import HFWeights
from megalora.model.config_json import model_shape, read_config
from megalora.model.families import names_of

DATASET = "stdlib-docstrings"
# Rows that are computed at a time.
MICRO_BATCH = 8
ADAM_EPS = 1e-8
DTYPES: dict[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}

Batch = dict[str, Tensor]


def device() -> torch.device:
    """Return where this process runs Megatron."""
    return torch.device("cpu" if cpu.installed() else "cuda")


def build(directory: Path, precision: Precision) -> GPTModel:
    """Return the model of a Hugging Face directory; its linears require a gradient, no others.

    Where embedding and unembedding are one table, the unembedding becomes a copy of its own: an
    adapter changes what the unembedding gives and not what the embedding does, so that only then
    full fine-tuning changes the same weights.
    """
    config = read_config(directory)
    model = cast(GPTModel, build_base(config, DTYPES[precision]))
    load_hf_base([model], directory)
    if model.share_embeddings_and_output_weights:
        weights = model.state_dict()
        weights["output_layer.weight"] = weights["embedding.word_embeddings.weight"].clone()
        model = cast(
            GPTModel, build_base({**config, "tie_word_embeddings": False}, DTYPES[precision])
        )
        model.load_state_dict(weights)
        set_rotary(model, config)
    model.requires_grad_(False)
    for _, base in base_linears(model):
        for weight in base.weights():
            weight.requires_grad_(True)
    return model.to(device())


def run(job: Job, directory: Path) -> Result:
    """Fine-tune a pretrained model, and measure its held-out loss and its adapters."""
    assert job.precision is not None
    assert job.seq_length is not None
    train, held_out = datasets(directory, job.seq_length, job.seed)
    lora = LoRAConfig(rank=job.rank, targets=job.targets, seed=job.seed) if job.rank else None
    model = build(directory, job.precision)
    trainer = Trainer(model, lora, job.lr, adam_eps=ADAM_EPS)
    start, curve = process_time(), []
    for step in range(job.steps):
        first = step * job.batch_size
        curve.append(train_step(trainer, train, range(first, first + job.batch_size)))
    cpu_seconds = process_time() - start
    # From more modules of the library than its first rows are.
    spread = range(0, len(held_out.rows), max(1, len(held_out.rows) // HELD_OUT_ROWS))
    return Result(
        curve=curve,
        final=evaluate(trainer, held_out, spread[:HELD_OUT_ROWS]),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        cpu_seconds=cpu_seconds,
        norms=norms(model, lora, directory) if lora else None,
    )


@lru_cache(maxsize=2)
def datasets(directory: Path, seq_length: int, seed: int) -> tuple[PackedDataset, PackedDataset]:
    """Return rows to train on, in an order that the seed decides, and held-out ones."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    # An epoch after another, as many as are asked for.
    train, held_out, _ = build_datasets(
        DATASET, tokenizer, seq_length, num_samples=(2**31, None, 0), seed=seed
    )
    assert train is not None
    assert held_out is not None
    return train, held_out


def batches(rows: PackedDataset, numbers: range) -> Iterator[Batch]:
    """Yield rows in microbatches, each [b, s], with the mask of their attention."""
    for first in range(0, len(numbers), MICRO_BATCH):
        samples = [rows[number] for number in numbers[first : first + MICRO_BATCH]]
        batch = {key: torch.stack([s[key] for s in samples]).to(device()) for key in samples[0]}
        yield {**batch, "attention_mask": block_diagonal_mask(batch["cu_seqlens"])}


def losses(trainer: Trainer, batch: Batch) -> Tensor:
    """Return the sum of the losses, in nats, of a microbatch's answers."""
    of_tokens = trainer.model(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
    )
    return (of_tokens.float() * batch["loss_mask"]).sum()


def train_step(trainer: Trainer, rows: PackedDataset, numbers: range) -> float:
    """Update by some rows; return the mean loss of their answers' tokens before it."""
    given = list(batches(rows, numbers))
    num_tokens = sum(batch["loss_mask"].sum() for batch in given)
    parts: list[Tensor] = []

    def each() -> Iterator[Tensor]:
        for batch in given:
            loss = losses(trainer, batch) / num_tokens
            parts.append(loss.detach())
            yield loss

    trainer.step(each())
    return sum(part.item() for part in parts)


@torch.no_grad()
def evaluate(trainer: Trainer, rows: PackedDataset, numbers: range) -> float:
    """Return the mean loss in nats of the tokens of the rows' answers."""
    total, num_tokens = 0.0, 0.0
    for batch in batches(rows, numbers):
        total += losses(trainer, batch).item()
        num_tokens += batch["loss_mask"].sum().item()
    return total / num_tokens


@torch.no_grad()
def norms(model: GPTModel, lora: LoRAConfig, directory: Path) -> Norms:
    """Measure the adapters of all Hugging Face's modules; see `Norms`."""
    tensors = {name: tensor.float() for name, tensor in gather_adapters([model]).items()}
    found = to_hf(tensors, lora, model_shape(read_config(directory)))
    of_base = base_norms(directory, tuple(found))
    modules = measure_all(found)
    return Norms(
        a=mean(module.spectral_a for module in modules),
        b=mean(module.spectral_b for module in modules),
        update=mean(module.spectral_update for module in modules),
        relative=mean(module.spectral_update / of_base[module.name] for module in modules),
        b_above_a=mean(float(module.spectral_b > module.spectral_a) for module in modules),
        modules=len(found),
    )


def spectral_norm(matrix: Tensor) -> float:
    """Return the largest singular value by the product of the matrix with itself, in fp64."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(wide @ wide.T)[-1])))


@lru_cache(maxsize=1)
def base_norms(directory: Path, modules: tuple[str, ...]) -> dict[str, float]:
    """Return the spectral norms of linears of a Hugging Face directory, by their names."""
    names = names_of(read_config(directory)["model_type"])
    files = HFWeights(directory, names)
    found = {}
    for module in modules:
        stored = f"{module}.weight"
        if stored not in files.shapes:
            # A tied unembedding.
            stored = f"{names.embedding}.weight"
        found[module] = spectral_norm(files.read(stored, 0, files.shapes[stored][0]))
    return found
