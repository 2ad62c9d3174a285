"""Tensors of all experts of a layer, and the weights and biases of single experts in them.

Most families have [experts, P out, in], one of the P projections after the other; those that are
`Names.interleaved` have [experts, in, P out], the features of the projections alternating, and
biases [experts, P out] beside.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megalora.hf.files import TensorFiles
from megalora.model.family import Names, without_numbers
from megalora.model.shape import MAX_SIZES

# What the name of a tensor of biases has behind that of the weights.
_BIAS = "_bias"


@dataclass(frozen=True, slots=True)
class InStack:
    """Where one expert's tensor lies in that of all.

    tensor: its name. number: of the projection among the `count` that are stacked. rows: of its
    own. alternates: the features of the projections alternate, and weights are transposed.
    """

    tensor: str
    expert: int
    number: int
    count: int
    rows: int
    alternates: bool

    def read(
        self, files: TensorFiles, first: int, count: int, columns: tuple[int, int] | None
    ) -> Tensor:
        """Read rows first:first + count, and of them `columns`, where it is a weight."""
        expert = slice(self.expert, self.expert + 1)
        inside = slice(*columns) if columns else slice(None)
        is_bias = self.tensor.endswith(_BIAS)
        if not self.alternates:
            begin = self.number * self.rows + first
            rest = () if is_bias else (inside,)
            return files.part(self.tensor, (expert, slice(begin, begin + count), *rest))[0]
        features = slice(self.count * first, self.count * (first + count))
        index = (expert, features) if is_bias else (expert, inside, features)
        part = files.part(self.tensor, index)[0]
        return projection_of(part, self.number, self.count, alternate=True)


def projection_of(stacked: Tensor, number: int, count: int, *, alternate: bool) -> Tensor:
    """Return one of the P projections in an expert's tensor, a view [out, in] of it.

    alternate: of its [in, P out], or of its biases [P out]; else of its [P out, in].
    """
    return stacked[..., number::count].t() if alternate else stacked.chunk(count)[number]


def stacked_module(name: str, names: Names) -> str:
    """Return the Megatron module whose tensors of all experts one is; empty where it is none."""
    pattern = without_numbers(name)[0].removeprefix(names.layer)
    known = names.stacked.get(pattern)
    if known is None and names.interleaved:
        known = names.stacked.get(pattern.removesuffix(_BIAS))
    return known or ""


def unstack(
    name: str, shape: tuple[int, ...], module: str, names: Names
) -> Iterator[tuple[str, tuple[int, ...], InStack]]:
    """Yield name, shape and place of each expert's tensors in one of all experts."""
    parts, (_, numbers) = names.in_layer(module), without_numbers(name)
    is_bias = names.interleaved and name.endswith(_BIAS)
    wanted = ("out",) if is_bias else ("in", "out") if names.interleaved else ("out", "in")
    count = len(parts)
    _check(name, shape, wanted, count)
    own = dict(zip(wanted, shape[1:], strict=True))
    own["out"] //= count
    whole = (own["out"],) if is_bias else (own["out"], own["in"])
    for expert in range(shape[0]):
        for number, part in enumerate(parts):
            known = f"{part.format(*numbers, expert)}.{'bias' if is_bias else 'weight'}"
            place = InStack(name, expert, number, count, own["out"], names.interleaved)
            yield known, whole, place


def _check(name: str, shape: tuple[int, ...], wanted: tuple[str, ...], count: int) -> None:
    expected = f"expected [experts, {', '.join(wanted)}]"
    if len(shape) != 1 + len(wanted):
        raise ValueError(f"{name} has shape {list(shape)}: {expected}")
    most, rows = MAX_SIZES["num_moe_experts"], shape[1 + wanted.index("out")]
    if not 0 < shape[0] <= most or rows % count:
        raise ValueError(
            f"{name} has shape {list(shape)}: {expected} of at most {most:,} experts, and gate and "
            "up of one size"
        )


def stacked(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Return tensors of which those of single experts are joined, where a family has them so."""
    if not names.interleaved:
        return dict(tensors)
    found: dict[str, Tensor] = {}
    places = _places(names)
    stacks: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in tensors.items():
        pattern, numbers = without_numbers(name)
        place = places.get(pattern)
        if place is None:
            found[name] = tensor
            continue
        layer, expert = numbers
        stacks.setdefault(place[0].format(layer), {})[place[1], expert] = tensor
    return {**found, **{name: _join(own) for name, own in stacks.items()}}


def _places(names: Names) -> dict[str, tuple[str, int]]:
    """Return, by the pattern of an expert's tensor, that of all experts' and its number there."""
    return {
        f"{part}.{kind}": (f"{names.layer}{stack}{end}", number)
        for stack, module in names.stacked.items()
        for number, part in enumerate(names.in_layer(module))
        for kind, end in (("weight", ""), ("bias", _BIAS))
    }


def _join(own: Mapping[tuple[int, int], Tensor]) -> Tensor:
    """Return [experts, in, P out] of weights, [experts, P out] of biases."""
    experts = sorted({expert for _, expert in own})
    numbers = sorted({number for number, _ in own})
    parts = [torch.stack([own[number, expert] for expert in experts]) for number in numbers]
    joined = torch.stack(parts, dim=2).flatten(1, 2)
    return joined.transpose(1, 2).contiguous() if joined.dim() == 3 else joined
