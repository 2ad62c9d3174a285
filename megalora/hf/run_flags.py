"""The flags of a run that goes on with an imported adapter."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping

from megalora.arguments import flags_of
from megalora.config import LoRAConfig
from megalora.hf.factors import LoRAFactors, summarise
from megalora.hf.joined import split_joined
from megalora.hf.linears import Linear, linears, locate
from megalora.model.families import names_of
from megalora.model.shape import ModelShape

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

# A Megatron linear in a layer; None for what is outside of the layers.
Place = tuple[int | None, Linear]


def targets_of(adapted: Iterable[Place], shape: ModelShape) -> tuple[str, ...]:
    """Return targets that select these linears of a model and no others, as short as can be."""
    return tuple(sorted(set(_targets(set(adapted), shape))))


def _targets(adapted: set[Place], shape: ModelShape) -> Iterator[str]:
    known = linears(names_of(shape.model_type)).values()
    for linear in {linear for _, linear in adapted}:
        leaf = linear.megatron.rpartition(".")[2]
        alike = [other for other in known if other.megatron.rpartition(".")[2] == leaf]
        if all(_places(other, shape) <= adapted for other in alike):
            yield leaf
        elif _places(linear, shape) <= adapted:
            yield linear.megatron
        else:
            yield from (linear.name(layer) for layer, other in adapted if other == linear)


def _places(linear: Linear, shape: ModelShape) -> set[Place]:
    """Return where a model has a linear."""
    if linear.is_unembedding:
        return {(None, linear)}
    return {(layer, linear) for layer in range(shape.num_layers) if linear.fits(layer, shape)}


def how_to_go_on(
    factors: Mapping[str, LoRAFactors],
    config: LoRAConfig,
    shape: ModelShape,
    *,
    hf_model: str,
    checkpoint: str,
) -> str:
    """Say by which flags a run goes on from an adapter that was imported, and what it adds."""
    flags = ["--hf-model", hf_model, "--load", checkpoint, *flags_of(config)]
    said = f"train on with: {shlex.join(flags)}"
    if new := sorted(_without_factors(split_joined(factors, shape), shape)):
        said += (
            f"\nwhich trains {summarise(new)} too, without factors in the adapter: they are in one "
            "linear of Megatron with others that have some, and start without an update"
        )
    return said


def _without_factors(factors: Mapping[str, LoRAFactors], shape: ModelShape) -> set[str]:
    """Return the modules that a Megatron linear joins with others that have factors."""
    places = {place[:2] for name in factors if (place := locate(name, shape))}
    return {
        _NUMBER.sub("*", name)
        for layer, linear in places
        for expert in (range(shape.num_moe_experts) if linear.is_expert else (0,))
        for name in linear.hf_names(layer, expert)
        if name not in factors
    }
