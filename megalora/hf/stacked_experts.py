"""Expert adapters as tensors with a dimension for the experts, Tinker's among them.

A layer has `experts.w1`, `w3` and `w2`, which are gate, up and down, or `gate_up_proj` and
`down_proj` as Megatron-Bridge names them: lora_A [E, r, in], lora_B [E, out, r]. A leading 1 says
that all experts share the factor. Tinker, and SGLang and vLLM for their shared-outer experts, share
A of gate and of up and B of down, which is what `--lora-expert-mode shared_outer` trains.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial, reduce

import torch
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.hf.factors import LoRAFactors, check_tensors
from megalora.hf.files import Planned
from megalora.hf.peft_config import PeftRules, split_expert
from megalora.hf.peft_experts import Experts
from megalora.hf.peft_experts_in import Pair, split_experts
from megalora.model.family import Projections
from megalora.model.shape import MAX_SIZES

_UNEMBEDDING, _UNEMBED_TOKENS = "lm_head", "model.unembed_tokens"
# Gate, up and down.
_TINKER: Projections = ("w1", "w3", "w2")
_PROJECTIONS: Projections = ("gate_proj", "up_proj", "down_proj")
_GATE_UP = "gate_up_proj"
_STACKED = re.compile(r"(.+\.experts)\.(w[123]|gate_proj|up_proj|down_proj|gate_up_proj)")


def from_tinker_name(name: str) -> str:
    """Return Hugging Face's name of a module outside of the experts."""
    return _UNEMBEDDING if name in (_UNEMBED_TOKENS, "unembed_tokens") else name


def to_tinker_name(name: str) -> str:
    """Return Tinker's name of a module outside of the experts."""
    return _UNEMBED_TOKENS if name == _UNEMBEDDING else name


def is_stacked(name: str) -> bool:
    """Say whether a module's name is that of all experts of a layer at once."""
    return _STACKED.fullmatch(name) is not None


def to_tinker_projection(projection: str) -> str:
    """Return w1, w3 or w2 for an expert's gate, up or down."""
    return dict(zip(_PROJECTIONS, _TINKER, strict=True)).get(projection, projection)


def from_tinker_projection(projection: str) -> str:
    """Return gate_proj, up_proj or down_proj for w1, w3 or w2."""
    return dict(zip(_TINKER, _PROJECTIONS, strict=True)).get(projection, projection)


def split_stacked(
    pairs: Mapping[str, Pair], rules: PeftRules, projections: Projections
) -> dict[str, LoRAFactors]:
    """Turn stacked factors into factors of single experts, which are views of them.

    pairs: `model.layers.0.mlp.experts.w1` -> (A, B). Two empty tensors stand for a projection that
    the model does not have. projections: the names that single experts' have.
    """
    pairs = {name: pair for name, pair in pairs.items() if any(t.numel() for t in pair)}
    for name, pair in pairs.items():
        _check_pair(name, pair, rules.rank(name))
    numbers = {t.shape[0] for pair in pairs.values() for t in pair} - {1}
    if pairs and len(numbers) != 1:
        raise ValueError(
            f"adapter's stacked experts are {sorted(numbers) or 'one for all'} in number: expected "
            "one number of experts, and 1 where they share a factor"
        )
    factors: dict[str, LoRAFactors] = {}
    known = _parts_by_name(projections)
    for name, (a, b) in pairs.items():
        prefix, _, last = name.rpartition(".")
        if last not in known:
            raise ValueError(
                f"{name} is of a gate, and the experts of this base have {', '.join(projections)}: "
                "this adapter belongs to another model"
            )
        parts = known[last]
        every = (*numbers, -1, -1)
        whole = (a.expand(every), b.expand(every))
        factors |= split_experts(prefix, parts, *whole, rules.scale(name))
    return factors


def _letters(projections: Projections) -> Projections:
    """Return Tinker's names: w1, w3 and w2 of a gate, up and down, w1 and w2 where none gates."""
    return _TINKER if len(projections) == len(_TINKER) else (_TINKER[0], _TINKER[-1])


def _parts_by_name(projections: Projections) -> dict[str, Projections]:
    """Return the projections that are in a stacked tensor, by the last part of its name."""
    named = _PROJECTIONS[-len(projections) :]
    found = {
        name: (projection,)
        for names in (_letters(projections), named)
        for name, projection in zip(names, projections, strict=True)
    }
    return {**found, _GATE_UP: projections[:-1]} if len(projections) == len(_TINKER) else found


def _check_pair(name: str, pair: Pair, rank: int) -> None:
    a, b = pair
    if a.dim() != 3 or b.dim() != 3 or (a.shape[1], b.shape[2]) != (rank, rank):
        raise ValueError(
            f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are not the factors of all "
            f"experts at rank {rank}: expected [E, {rank}, in] and [E, out, {rank}], with 1 for E "
            "where the experts share a factor"
        )
    check_tensors({f"{name}.lora_A": a.flatten(0, 1), f"{name}.lora_B": b.flatten(0, 1)})
    if max(a.shape[0], b.shape[0]) > MAX_SIZES["num_moe_experts"]:
        raise ValueError(
            f"{name}: lora_A {list(a.shape)} and lora_B {list(b.shape)} have more experts than "
            f"{MAX_SIZES['num_moe_experts']:,}"
        )


def check_shared(names: Iterable[str], config: LoRAConfig) -> None:
    """Raise ValueError where `join_tinker` will, known by how the experts are trained."""
    if config.expert_mode != "shared_outer" and any(split_expert(name) for name in names):
        raise ValueError(
            "export_format is `tinker`, which has A of gate and up and B of down once for all "
            "experts: add --lora-expert-mode shared_outer, or leave --export-format out"
        )


def join_tinker(experts: Experts) -> dict[str, Planned]:
    """Return Tinker's tensors by key, each made when it is written.

    Raises ValueError where experts do not share the outer factors.
    """
    planned: dict[str, Planned] = {}
    for prefix in experts.prefixes:
        projections = experts.names.projections
        for letter, projection in zip(_letters(projections), projections, strict=True):
            names = [f"{prefix}.{expert}.{projection}" for expert in range(experts.num_experts)]
            modules = [experts.factors[name] for name in names]
            outer = "lora_B" if letter == "w2" else "lora_A"
            for factor in ("lora_A", "lora_B"):
                tensors = [getattr(module, factor) for module in modules]
                stacked = [_shared(names, modules, factor)] if factor == outer else tensors
                # Mixed precisions join at the highest.
                dtype = reduce(torch.promote_types, {tensor.dtype for tensor in stacked})
                planned[f"{prefix}.{letter}.{factor}.weight"] = Planned(
                    (len(stacked), *stacked[0].shape), dtype, partial(_stack, stacked, dtype)
                )
    return planned


def _stack(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([tensor.to(dtype) for tensor in tensors])


def _shared(names: list[str], modules: list[LoRAFactors], factor: str) -> Tensor:
    """Return the factor that all experts have, of those that are more than a blank."""
    used = {
        name: getattr(module, factor)
        for name, module in zip(names, modules, strict=True)
        if module.lora_A.any()
    }
    one = next(iter(used.values()), getattr(modules[0], factor))
    other = [name for name, tensor in used.items() if not is_one(tensor, one)]
    if other:
        raise ValueError(
            f"{factor} of {other[0]} is another than that of {next(iter(used))}, and the format "
            "`tinker` has one for all experts: train with --lora-expert-mode shared_outer, or "
            "export as `peft`"
        )
    return one


def is_one(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors hold the same, which views of one need no comparison for."""
    places = {(t.data_ptr(), t.shape, t.stride()) for t in (one, other)}
    return len(places) == 1 or torch.equal(one, other)
