"""Which Hugging Face projections each Megatron linear fuses, and both sides' names for them."""

import functools
import re
from collections import defaultdict
from dataclasses import dataclass, replace

from megalora.config import LoRAConfig
from megalora.model.facts import DELTA_GATES, MAMBA_WIDE
from megalora.model.families import names_of
from megalora.model.family import Names, without_numbers
from megalora.model.layer_kinds import ATTENTION, EXPERTS, MAMBA, MLP
from megalora.model.shape import ModelShape
from megalora.targets import has_wide_parts_alone

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Linear:
    """A Megatron linear and the Hugging Face modules that it fuses, in their order.

    modules: whole names, with `{}` for the layer and for the expert.
    """

    megatron: str
    modules: tuple[str, ...]

    @property
    def projections(self) -> tuple[str, ...]:
        """Return the last parts of the Hugging Face names."""
        return tuple(name.rpartition(".")[2] for name in self.modules)

    @property
    def is_expert(self) -> bool:
        """Say whether every expert has one."""
        return ".experts." in self.megatron

    @property
    def is_shared(self) -> bool:
        """Say whether it is of the shared experts."""
        return ".shared_experts." in self.megatron

    @property
    def is_qkv(self) -> bool:
        """Say whether rows are interleaved per query group."""
        return self.megatron.endswith("linear_qkv")

    @property
    def is_joint_down(self) -> bool:
        """Say whether it projects queries, and keys and values, to the latent of each."""
        return self.megatron == _JOINT_DOWN

    @property
    def is_of_delta_net(self) -> bool:
        """Say whether it projects the hidden state to all that a gated delta net reads."""
        return self.megatron == _DELTA_NET[0]

    @property
    def is_fc1(self) -> bool:
        """Say whether it is the first of an MLP, which reads the hidden state."""
        return self.megatron.endswith("linear_fc1")

    @property
    def is_router(self) -> bool:
        """Say whether its rows are the experts that it chooses from."""
        return self.megatron == _ROUTER

    @property
    def is_unembedding(self) -> bool:
        """Say whether its rows are the vocabulary."""
        return self.megatron == _UNEMBEDDING

    def fits(self, layer: int, shape: ModelShape) -> bool:
        """Say whether a layer has this linear: either a dense MLP or experts, and so on."""
        kind = shape.kind(layer)
        if kind and not self.megatron.startswith(_OF_KIND[kind]):
            return False
        if self.megatron in _LATENT_QUERIES:
            return self.megatron in _latent_queries(shape)
        if self.megatron in _DELTA_NET:
            return shape.is_delta_net(layer)
        if not self.megatron.startswith("mlp."):
            return not shape.is_delta_net(layer)
        if self.is_shared and not shape.moe_shared_expert_intermediate_size:
            return False
        is_dense = self.megatron in ("mlp.linear_fc1", "mlp.linear_fc2")
        return is_dense != shape.has_experts(layer)

    def name(self, layer: int | None) -> str:
        """Return the global Megatron name in a layer."""
        return self.megatron if layer is None else f"decoder.layers.{layer}.{self.megatron}"

    def hf_names(self, layer: int | None, expert: int = 0) -> list[str]:
        """Return the whole Hugging Face names in a layer, of one expert where it has them."""
        return [name.format(layer, expert) for name in self.modules]

    def is_delta_gate(self, projection: str) -> bool:
        """Say whether a projection makes a delta net's beta or alpha."""
        return self.is_of_delta_net and projection in self.projections[-len(DELTA_GATES) :]

    def adapted(self, config: LoRAConfig, layer: int | None) -> "Linear":
        """Return what of it has an adapter in a layer.

        A delta net's gates only where they are asked for; of Mamba-2's in_proj perhaps z and x.
        """
        if has_wide_parts_alone(self.name(layer), config):
            [module] = self.modules
            return replace(self, modules=tuple(f"{module}.{part}" for part in MAMBA_WIDE))
        if not self.is_of_delta_net or config.delta_gates:
            return self
        return replace(self, modules=self.modules[: -len(DELTA_GATES)])

    def rank(self, config: LoRAConfig, shape: ModelShape) -> int:
        """Return the rank of one projection's adapter."""
        return config.resolve_expert_rank(shape.moe_router_topk) if self.is_expert else config.rank


_UNEMBEDDING, _ROUTER = "output_layer", "mlp.router"
_DELTA_NET = ("self_attention.in_proj", "self_attention.out_proj")
# Linears by other names than `linear_*`.
MAMBA_IN_PROJ = "mixer.in_proj"
_OTHERS = (_ROUTER, MAMBA_IN_PROJ, "mixer.out_proj", *_DELTA_NET)
# What is in a layer of one kind.
_OF_KIND = {MAMBA: "mixer.", ATTENTION: "self_attention.", MLP: "mlp.", EXPERTS: "mlp."}


_DIRECT, _DOWN, _UP, _KV_DOWN, _JOINT_DOWN = (
    f"self_attention.linear_{name}"
    for name in ("q_proj", "q_down_proj", "q_up_proj", "kv_down_proj", "qkv_down_proj")
)
# Of attention through latents, those that not every build of it has.
_LATENT_QUERIES = (_DIRECT, _DOWN, _UP, _KV_DOWN, _JOINT_DOWN)


def _latent_queries(shape: ModelShape) -> tuple[str, ...]:
    if not shape.q_lora_rank:
        return _DIRECT, _KV_DOWN
    return (_JOINT_DOWN, _UP) if shape.mla_down_proj_fusion else (_DOWN, _UP, _KV_DOWN)


@functools.cache
def linears(names: Names) -> dict[str, Linear]:
    """Return the linears that can have adapters by their Megatron names in a layer."""
    found = {_UNEMBEDDING: Linear(_UNEMBEDDING, (names.unembedding,))}
    for module in names.modules:
        if module in _OTHERS or module.rpartition(".")[2].startswith("linear_"):
            found[module] = Linear(module, names.parts_in_layer(module))
    return found


@functools.cache
def _by_hf_name(names: Names) -> dict[str, list[tuple[Linear, str]]]:
    """Return the linears that a module may be a projection of; a model has one of them."""
    found: dict[str, list[tuple[Linear, str]]] = defaultdict(list)
    for linear in linears(names).values():
        for name, projection in zip(linear.modules, linear.projections, strict=True):
            found[name].append((linear, projection))
        for part in MAMBA_WIDE if linear.megatron == MAMBA_IN_PROJ else ():
            found[f"{linear.modules[0]}.{part}"].append((linear, part))
    return found


def find_linear(name: str, shape: ModelShape) -> tuple[int | None, Linear]:
    """Return the layer and the linear of a global Megatron module name.

    Raises ValueError for a module that Hugging Face adapters cannot name.
    """
    found = _LAYER.fullmatch(name)
    layer, rest = (int(found.group(1)), found.group(2)) if found else (None, name)
    linear = linears(names_of(shape.model_type)).get(rest)
    if name.startswith("mtp."):
        raise ValueError(
            f"{name} has no adapter in Hugging Face's models: train with --lora-targets "
            "'decoder.*linear_*' output_layer, which leave out what predicts one token more, or "
            "merge the adapter into its base"
        )
    if linear is None or linear.is_unembedding != (layer is None):
        raise ValueError(
            f"{name} has no adapter in Hugging Face's models: train with --lora-targets that leave "
            "it out, or merge the adapter into its base"
        )
    return layer, linear


def locate(name: str, shape: ModelShape) -> tuple[int | None, Linear, int, str] | None:
    """Return (layer, linear, expert, projection) of a Hugging Face name, None where none is."""
    pattern, numbers = without_numbers(name)
    layer, *experts = numbers or [0]
    for linear, projection in _by_hf_name(names_of(shape.model_type)).get(pattern, []):
        if linear.is_unembedding:
            return None, linear, 0, projection
        expert = experts[0] if experts else 0
        is_there = layer < shape.num_layers and linear.fits(layer, shape)
        if is_there and (not linear.is_expert or expert < shape.num_moe_experts):
            return layer, linear, expert, projection
    return None
