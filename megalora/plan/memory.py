"""What one rank holds, read off the tensors that its model, buffers and optimizer are made of."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from megatron.core import parallel_state

from megalora.adapters.adapter import named_adapters
from megalora.plan import ranks
from megalora.plan.holdings import Held, Kind, held, parameter_names, shards, storages
from megalora.plan.phases import Step
from megalora.plan.script import Built
from megalora.targets import is_adapter_key

ADAPTERS, PADDING = "adapters", "padding"
# By what their names have; the first that fits.
_PARTS = (
    ("embedding", ("embedding.",)),
    ("unembedding", ("output_layer.",)),
    ("experts", (".experts.",)),
    ("attention", ("self_attention.", "cross_attention.", ".mixer.")),
    ("mlp", (".mlp.",)),
)
# Of bf16.
_EXPORTED = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one part of a model takes: parameters are counted, everything else is in bytes.

    padding, of DDP's buffers, is a part of no parameters.
    """

    name: str
    parameters: int
    weights: int
    gradients: int
    optimizer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Bytes of tensors that files have of the adapters of one stage; all stages' make the whole.

    checkpoint: what `--save` writes, with the optimizer's states. exported: a Hugging Face adapter
    in bf16, which has no padding of the vocabulary.
    """

    checkpoint: int
    exported: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """What a rank holds between steps: parameters are counted, everything else is in bytes.

    weights: of all parameters, as layers compute with them. gradients: the buffers that they are
    summed in. Both with DDP's padding. optimizer: fp32 weights and Adam's moments; of the ranks
    that the distributed optimizer shards them over, from optimizer_least to optimizer_most, which
    fullest_rank has. buffers: a model's tensors that are no parameters.
    """

    frozen: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    optimizer_least: int
    optimizer_most: int
    fullest_rank: int
    buffers: int
    parts: tuple[Part, ...]
    stored: Stored


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory(Static):
    """What a rank holds, also during a step.

    other: small tensors beside a model, such as a loss scale. activations: the most that a step
    holds beside all of these.
    """

    other: int
    activations: int

    @property
    def peak(self) -> int:
        """Sum of all on the fullest of the ranks that this one stands for, in bytes."""
        kept = self.weights + self.gradients + self.optimizer_most + self.buffers + self.other
        return kept + self.activations


def memory(built: Built, step: Step) -> Memory:
    """Read what a rank holds off its model and optimizer, and off the step that it ran."""
    fixed = static(built)
    kept = fixed.weights + fixed.gradients + fixed.optimizer + fixed.buffers
    return Memory(
        **{name: getattr(fixed, name) for name in Static.__slots__},
        other=step.before - kept,
        activations=step.peak - step.before,
    )


def static(built: Built) -> Static:
    """Read what a rank holds between steps off its model and its optimizer, once that has stepped.

    Exact: every tensor is asked for its storage. Of the other ranks' shards of the optimizer the
    elements are counted, and each takes what it takes here.
    """
    holdings = list(held(built.model, built.optimizer))
    totals = storages(holdings)
    parameters = [parameter for parameter, _ in parameter_names(built.model)]
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    rates = _bytes_per_element(built, holdings)
    by_rank = _optimizer_by_rank(built, rates) or {built.args.rank: totals[Kind.OPTIMIZER]}
    fullest = max(by_rank, key=lambda rank: by_rank[rank])
    return Static(
        frozen=sum(p.numel() for p in parameters) - trained,
        trained=trained,
        weights=totals[Kind.WEIGHTS],
        gradients=totals[Kind.GRADIENTS],
        optimizer=totals[Kind.OPTIMIZER],
        optimizer_least=min(by_rank.values()),
        optimizer_most=by_rank[fullest],
        fullest_rank=fullest,
        buffers=totals[Kind.BUFFERS],
        parts=tuple(_parts(parameters, holdings, totals)),
        stored=_stored(built, rates),
    )


def _parts(
    parameters: Sequence[torch.nn.Parameter], holdings: Sequence[Held], totals: dict[Kind, int]
) -> list[Part]:
    sums: dict[str, Counter[Kind]] = {}
    counts: Counter[str] = Counter()
    weights: set[int] = set()
    for one in holdings:
        # What an optimizer updates may be the parameter itself, or a part of it.
        storage = one.tensor.untyped_storage()._cdata
        if one.kind is Kind.WEIGHTS:
            weights.add(storage)
        if one.parameter and (one.kind is not Kind.OPTIMIZER or storage not in weights):
            name = _part(one.parameter)
            sums.setdefault(name, Counter())[one.kind] += one.tensor.nbytes
            if one.kind is Kind.WEIGHTS:
                counts[name] += one.tensor.numel()
    everywhere = sum(sums.values(), Counter())
    sums[PADDING] = Counter(
        {kind: totals[kind] - everywhere[kind] for kind in Kind if kind is not Kind.BUFFERS}
    )
    return [
        Part(
            name=name,
            parameters=counts[name],
            weights=own[Kind.WEIGHTS],
            gradients=own[Kind.GRADIENTS],
            optimizer=own[Kind.OPTIMIZER],
        )
        for name, own in sums.items()
    ]


def _part(parameter: str) -> str:
    if is_adapter_key(parameter):
        return ADAPTERS
    return next((name for name, words in _PARTS if any(w in parameter for w in words)), "other")


def _bytes_per_element(built: Built, holdings: Sequence[Held]) -> dict[torch.dtype, float]:
    """Return what the optimizer keeps for each element that it updates, by the parameter's type."""
    names = dict(parameter_names(built.model))
    weights = {h.tensor.untyped_storage()._cdata for h in holdings if h.kind is Kind.WEIGHTS}
    kept: Counter[str] = Counter()
    for one in holdings:
        if one.kind is Kind.OPTIMIZER and one.tensor.untyped_storage()._cdata not in weights:
            kept[one.parameter] += one.tensor.nbytes
    sizes: Counter[torch.dtype] = Counter()
    elements: Counter[torch.dtype] = Counter()
    for parameter, own in shards(built.optimizer):
        sizes[parameter.dtype] += kept[names[parameter]]
        elements[parameter.dtype] += own.numel()
    return {dtype: sizes[dtype] / elements[dtype] for dtype in elements}


def _optimizer_by_rank(built: Built, rates: dict[torch.dtype, float]) -> dict[int, int]:
    """Return the optimizer's bytes on each rank of this stage, where they are not the same."""
    if not built.args.use_distributed_optimizer:
        return {}
    stage = parallel_state.get_pipeline_model_parallel_rank()
    by_rank = ranks.shards_by_rank(built.model, built.args, stage)
    return {
        rank: round(sum(count * _rate(rates, dtype) for dtype, count in elements.items()))
        for rank, elements in by_rank.items()
    }


def _rate(rates: dict[torch.dtype, float], dtype: torch.dtype) -> float:
    """Return the bytes for an element; of a type that this rank has no shard of, Adam's.

    Two moments in fp32, and fp32 weights where the parameter's are of another type.
    """
    return rates.get(dtype, 8 if dtype is torch.float32 else 12)


def _stored(built: Built, rates: dict[torch.dtype, float]) -> Stored:
    checkpoint, exported = 0.0, 0
    for _, adapter in named_adapters(built.model):
        for parameter, sharding in adapter.factors():
            shape = sharding.whole_shape()
            size = parameter.element_size() + _rate(rates, parameter.dtype)
            checkpoint += prod(shape) * size
            is_output = sharding.factor.is_output
            rows = shape[sharding.factor.dim]
            padding = rows - built.args.vocab_size if sharding.rows.padded and is_output else 0
            exported += _EXPORTED * prod(shape) * (rows - padding) // rows
    return Stored(checkpoint=round(checkpoint), exported=exported)
