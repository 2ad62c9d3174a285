"""Base weights between a Hugging Face directory and the chunks of a sharded Megatron model."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters.finite import all_finite
from megalora.adapters.world import sent_by
from megalora.checkpoint.ranks import on_all_ranks
from megalora.hf.built import check_built_for
from megalora.hf.cuts import Piece, Placement, Shard
from megalora.hf.factors import summarise
from megalora.hf.latent_norms import set_latent_norms
from megalora.hf.rotary import set_rotary
from megalora.hf.safetensors_files import HFWeights
from megalora.hf.weights import Weights
from megalora.model.config_json import read_config
from megalora.model.families import names_of
from megalora.model.hybrid import config_of, gpt_name, pattern_in
from megalora.targets import global_name, is_adapter_key

if TYPE_CHECKING:
    from megatron.core.models.gpt.gpt_model import GPTModel

_LAYERS = re.compile(r"(decoder|mtp)\.layers\.\d+")
_LAYER = re.compile(r"(decoder|mtp)\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Job:
    """A parameter with its name and its pieces, which one of those that hold it reads for all.

    replicas: the ranks that hold the same part; reader: which of them, as the group counts.
    """

    name: str
    param: Tensor
    pieces: list[Piece]
    replicas: ProcessGroup
    reader: int

    @property
    def is_own(self) -> bool:
        """Say whether this rank reads it."""
        return self.replicas.rank() == self.reader


@torch.no_grad()
def load_hf_base(
    model_chunks: Sequence[torch.nn.Module],
    directory: str | Path,
    *,
    progress: Callable[[str], object] | None = None,
) -> None:
    """Load a Hugging Face directory into model chunks, on any parallel layout.

    Of a slice, one of the ranks that hold it reads it, straight into its parameter, and sends it to
    the others, in turn for each parameter: a byte is read once for each part that it belongs to.
    Rank 0 looks at all headers; others open the files that they read. Adapters are left alone.
    Rotary embeddings are set from config.json, since Megatron's builder drops scaling factors, and
    so are the norms of latents. A layer that predicts one token more is loaded where it was built.
    progress: called with every parameter's name.
    Raises ValueError, before anything is changed, where the directory is broken or incomplete, or
    where the model was built with other sizes or options than its config.json has; once all is
    read, where a rank's weights are not finite; and all of it on all ranks, which must all call it.
    """
    chunks = cast("Sequence[GPTModel]", model_chunks)
    config, files = on_all_ranks(lambda: _look(chunks, directory), only=0)
    files.files.directory = Path(directory)
    jobs = on_all_ranks(lambda: _plan(chunks, config))
    on_all_ranks(lambda: _refuse_others(_other_copies(chunks, config, jobs, files)))
    on_all_ranks(lambda: _read(jobs, files, progress))
    for job in jobs:
        if job.replicas.size() > 1:
            sent_by(job.reader, job.param, job.replicas)
        if progress and not job.is_own:
            progress(job.name)
    for chunk in chunks:
        set_rotary(chunk, config)
        set_latent_norms(chunk)


def _look(chunks: "Sequence[GPTModel]", directory: str | Path) -> tuple[dict[str, Any], HFWeights]:
    """Return what a directory says and has, once it has what the model needs."""
    config = read_config(directory)
    check_built_for(chunks[0], config)
    files = HFWeights(directory, names_of(config["model_type"]))
    weights = weights_of(chunks[0], config)
    tied = weights.shape.tied_embeddings
    files.check(weights.expected(), tied=tied, may_have=weights.may_be_stored)
    return config, files


def _plan(chunks: "Sequence[GPTModel]", config: Mapping[str, Any]) -> list[Job]:
    """Return this rank's parameters with what they are read from; nothing is changed."""
    jobs: list[Job] = []
    taken: Counter[ProcessGroup] = Counter()
    for chunk in chunks:
        check_built_for(chunk, config)
        for name, param, _, pieces in parameters(chunk, weights_of(chunk, config)):
            _check_covered(name, param, pieces)
            replicas = replicas_of(chunk, name)
            jobs.append(Job(name, param, pieces, replicas, taken[replicas] % replicas.size()))
            taken[replicas] += 1
    return jobs


def replicas_of(chunk: "GPTModel", name: str) -> ProcessGroup:
    """Return the ranks that hold the same part of a parameter, by its name."""
    groups = chunk.pg_collection
    return cast("ProcessGroup", groups.expt_dp if ".experts." in name else groups.dp_cp)


def _read(jobs: Sequence[Job], files: HFWeights, progress: Callable[[str], object] | None) -> None:
    """Fill the parameters that this rank reads; ValueError where one is not finite."""
    problems: list[str] = []
    for job in jobs:
        if job.is_own:
            _fill(job.param, job.pieces, files)
            problems += _not_finite(job.param, job.pieces, files)
            if progress:
                progress(job.name)
    _refuse(problems)


def _fill(param: Tensor, pieces: list[Piece], files: HFWeights) -> None:
    filled = sum(piece.count for piece in pieces)
    param[filled:].zero_()
    for piece in pieces:
        part = files.read(piece.name, piece.hf_first, piece.count, piece.columns)
        if piece.more:
            part = part.double() - piece.more
        param[piece.first : piece.first + piece.count].copy_(part)


def _not_finite(param: Tensor, pieces: list[Piece], files: HFWeights) -> list[str]:
    """Return the pieces that a parameter has NaN or infinities from, after file and precision.

    The parameter is looked at, not the file: it may be on a GPU, and of another precision.
    """
    if all_finite(param):
        return []
    bad = [p for p in pieces if not all_finite(param[p.first : p.first + p.count])]
    return [f"{files.path(piece.name)}: {piece.name} as {param.dtype}" for piece in bad]


def _other_copies(
    chunks: "Sequence[GPTModel]", config: Mapping[str, Any], jobs: Sequence[Job], files: HFWeights
) -> list[str]:
    """Return the tables of layers that predict one token more that are not the model's own.

    Of the rows that this rank and its replicas hold, each compares a share.
    """
    copies = {k: v for chunk in chunks for k, v in weights_of(chunk, config).copies().items()}

    def is_same(copy: str, original: str) -> bool:
        rows = (
            _share(piece, job.replicas)
            for job in jobs
            for piece in job.pieces
            if piece.name == original
        )
        return files.shapes[copy] == files.shapes[original] and all(
            files.read(copy, *share).equal(files.read(original, *share)) for share in rows
        )

    return [
        f"{copy} differs from {original}"
        for copy, original in copies.items()
        if copy in files.shapes and not is_same(copy, original)
    ]


def _share(piece: Piece, replicas: ProcessGroup) -> tuple[int, int]:
    """Return the first row, and how many, of a piece that this one of its replicas looks at."""
    first, end = (
        piece.count * rank // replicas.size() for rank in (replicas.rank(), replicas.rank() + 1)
    )
    return piece.hf_first + first, end - first


def _refuse_others(others: list[str]) -> None:
    if others:
        raise ValueError(
            f"base has tables of its own where one token more is predicted: {summarise(others)}: "
            "Megatron has one for all: leave --mtp-num-layers out"
        )


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(
            f"base has NaN or infinite values in {summarise(problems)}: download it again; or its "
            "values are beyond this precision, and need --bf16"
        )


def weights_of(chunk: "GPTModel", config: Mapping[str, Any]) -> Weights:
    """Return the pieces of this rank's parameters of a model."""
    return Weights(config, placement(chunk), num_predictions=chunk.config.mtp_num_layers or 0)


def placement(chunk: "GPTModel") -> Placement:
    """Return which parts of the weights this rank holds."""
    groups = chunk.pg_collection
    tp = Shard(groups.tp.rank(), groups.tp.size())
    if not chunk.config.num_moe_experts:
        return Placement(tp, Shard(), Shard())
    expert_tp = Shard(groups.expt_tp.rank(), groups.expt_tp.size())
    return Placement(tp, expert_tp, Shard(groups.ep.rank(), groups.ep.size()))


def parameters(
    chunk: "GPTModel", weights: Weights
) -> Iterator[tuple[str, Tensor, int | None, list[Piece]]]:
    """Yield every base parameter of a chunk with its global layer from 0 and its pieces.

    Names are global, and those of the GPT model that a HybridModel equals.
    """
    # What predicts one token more is counted on behind the decoder's.
    behind = {"decoder": 0, "mtp": config_of(chunk).num_layers}
    numbers = {
        name: cast(int, module.layer_number)
        for name, module in chunk.named_modules()
        if _LAYERS.fullmatch(name)
    }
    for local, param in [*chunk.named_parameters(), *_expert_biases(chunk)]:
        if is_adapter_key(local):
            continue
        name = gpt_name(global_name(local, numbers), pattern_in(chunk))
        found = _LAYER.match(name)
        layer = int(found[2]) + behind[found[1]] if found else None
        yield name, param, layer, weights.pieces(name, layer, param.shape[0])


def _expert_biases(chunk: "GPTModel") -> list[tuple[str, Tensor]]:
    return [(n, buffer) for n, buffer in chunk.named_buffers() if n.endswith("router.expert_bias")]


def _check_covered(name: str, param: Tensor, pieces: list[Piece]) -> None:
    covered = sum(piece.count for piece in pieces)
    is_table = name.startswith(("embedding.", "output_layer."))
    widths = {p.columns[1] - p.columns[0] for p in pieces if p.columns}
    if (covered != param.shape[0] and not is_table) or (widths and widths != {param.shape[1]}):
        raise ValueError(
            f"Megatron parameter {name} has shape {list(param.shape)}, its config.json fills "
            f"{covered} rows: the model was built with other sizes"
        )
