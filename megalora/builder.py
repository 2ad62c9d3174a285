"""Attach adapters to the model chunks that Megatron's builders build, and freeze the base."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_linear_attention_pattern,
)
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.distributed import ProcessGroup

from megalora import replace
from megalora.adapters import pissa
from megalora.adapters.adapter import LoRAAdapter, named_adapters
from megalora.adapters.bases import Base, base_linears, left_out, refusal
from megalora.adapters.frozen import freeze_router_bias, make_embedding_require_grad
from megalora.adapters.gated import bind_gated
from megalora.adapters.padding import leave_out_padding
from megalora.adapters.rows import IN_PARTS, parts_of
from megalora.adapters.styles import ADAPTERS
from megalora.adapters.world import union
from megalora.checkpoint.state import install_checkpointing
from megalora.checkpoint.unpickle import PICKLES
from megalora.config import LoRAConfig
from megalora.model.hybrid import config_of, equals_gpt, gpt_name, layers_of, pattern_in
from megalora.model.layer_kinds import mamba_sizes
from megalora.model.shape import DELTA_SIZES
from megalora.targets import (
    ADAPTER_SUFFIX,
    PRESETS,
    PROJECTIONS,
    ModelFacts,
    check_all_matched,
    check_targets,
    global_name,
    matching_target,
    plan,
)

ModelChunks = list[torch.nn.Module]


def lora_hook(
    config: LoRAConfig, *, vocab_size: int | None = None
) -> Callable[[ModelChunks], ModelChunks]:
    """Return a hook for the `pre_wrap_hooks` of a GPT or hybrid configuration: `apply_lora`.

    What Megatron loads after it cannot run code (see `megalora.checkpoint.unpickle`).
    """

    def attach(model_chunks: ModelChunks) -> ModelChunks:
        replace.install(PICKLES)
        return apply_lora(model_chunks, config, vocab_size=vocab_size)

    return attach


def apply_lora(
    model_chunks: ModelChunks, config: LoRAConfig, *, vocab_size: int | None = None
) -> ModelChunks:
    """Attach adapters to unwrapped model chunks, freeze everything else, return the chunks.

    Call it after building (and loading) the model and before DDP wraps it. All ranks must call it.
    vocab_size: rows of the vocabulary that are tokens; Megatron's padding after them then takes no
    part in the softmax, with which the loss depends on the tensor-parallel size. None leaves it in.
    Raises ValueError, before the model is changed, where a target matches nothing in the whole
    model, where a module would bypass its adapter, or where sizes cannot be sharded.
    """
    check_targets(config.targets)
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}: give how many rows are tokens, 1 or more")
    chunks = cast(list[MegatronModule], model_chunks)
    for chunk in chunks:
        _check_unwrapped(chunk)
    found = [(chunk, list(_candidates(chunk))) for chunk in chunks]
    everything = [candidate for _, candidates in found for candidate in candidates]
    _check_matched(everything, config.targets)
    made = [_make_adapters(chunk, candidates, config) for chunk, candidates in found]
    for chunk, pairs in zip(chunks, made, strict=True):
        chunk.requires_grad_(False)
        _attach(pairs)
        bind_gated(chunk)
        install_checkpointing(chunk, config, model_facts(chunk), _sizes(chunk, vocab_size))
        freeze_router_bias(chunk)
        make_embedding_require_grad(chunk)
        if vocab_size is not None:
            leave_out_padding(chunk, vocab_size)
    _tell_left_out(everything, config)
    _warn_of_wide_ranks(adapter for pairs in made for _, adapter in pairs)
    if config.init == "pissa":
        pissa.start_from_base(model_chunks, vocab_size=vocab_size)
    return model_chunks


def set_enabled(model_chunks: Sequence[torch.nn.Module], enabled: bool) -> None:
    """Switch all adapters on or off; off, the model is its base (a reference policy)."""
    for _, adapter in named_adapters(model_chunks):
        adapter.enabled = enabled


class _Candidate:
    """A base linear with its global name and where its adapter goes."""

    def __init__(self, name: str, base: Base, parent: torch.nn.Module) -> None:
        self.name, self.base, self.parent = name, base, parent
        self.leaf = name.rpartition(".")[2]
        self.left_out = left_out(parent, self.leaf)


def model_facts(chunk: MegatronModule) -> ModelFacts:
    """Read the sizes that decide the form of adapters from a model chunk and its configuration.

    A HybridModel that equals a GPT model has that one's.
    """
    config, pattern = config_of(chunk), pattern_in(chunk)
    return ModelFacts(
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups or config.num_attention_heads,
        kv_channels=config.kv_channels or config.hidden_size // config.num_attention_heads,
        gated_linear_unit=config.gated_linear_unit,
        attention_output_gate=getattr(config, "attention_output_gate", False),
        moe_router_topk=config.moe_router_topk,
        num_moe_experts=config.num_moe_experts or 0,
        moe_layer_freq=_moe_layer_freq(config),
        q_lora_rank=getattr(config, "q_lora_rank", None) or 0,
        **_delta_nets(config, pattern),
        **mamba_sizes(config, pattern),
        hybrid_layer_pattern="" if equals_gpt(pattern) else layers_of(pattern),
    )


def _moe_layer_freq(config: TransformerConfig) -> list[int]:
    frequency = config.moe_layer_freq
    if isinstance(frequency, int):
        frequency = [layer % frequency == 0 for layer in range(config.num_layers)]
    return [int(moe) for moe in frequency]


def _delta_nets(config: TransformerConfig, pattern: str) -> dict[str, Any]:
    is_delta_net = [0] * config.num_layers
    if config.experimental_attention_variant == "gated_delta_net":
        is_delta_net = get_linear_attention_pattern(config)
    elif "G" not in pattern:
        return {}
    sizes = {name: getattr(config, name) for name in DELTA_SIZES}
    return {**sizes, "linear_attention_freq": is_delta_net if any(is_delta_net) else 0}


def _sizes(chunk: MegatronModule, vocab_size: int | None) -> dict[str, int]:
    config = config_of(chunk)
    sizes = {"num_layers": config.num_layers, "hidden_size": config.hidden_size}
    return sizes if vocab_size is None else {**sizes, "vocab_size": vocab_size}


def _check_unwrapped(chunk: torch.nn.Module) -> None:
    if hasattr(chunk, "module"):
        raise ValueError(
            f"model chunk is a {type(chunk).__name__}, which is wrapped already: "
            "call apply_lora before DDP and Float16Module, or use lora_hook in pre_wrap_hooks"
        )
    if next(named_adapters([chunk]), None) is not None:
        raise ValueError("model chunk has adapters already: call apply_lora once")


def _candidates(chunk: torch.nn.Module) -> Iterator[_Candidate]:
    layer_numbers = {
        name: module.layer_number
        for name, module in chunk.named_modules()
        if isinstance(module, TransformerLayer | MambaLayer) and name.startswith("decoder.")
    }
    for name, base in base_linears(chunk):
        parent = chunk.get_submodule(name.rpartition(".")[0])
        own_name = global_name(name, layer_numbers)
        yield _Candidate(gpt_name(own_name, pattern_in(chunk)), base, parent)


def _check_matched(candidates: list[_Candidate], targets: tuple[str, ...]) -> None:
    matched = {target for c in candidates if (target := matching_target(c.name, targets))}
    leaves, world = {c.leaf for c in candidates}, _world()
    check_all_matched(targets, union(matched, world), union(leaves, world))


def _world() -> ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def _make_adapters(
    chunk: MegatronModule, candidates: list[_Candidate], config: LoRAConfig
) -> list[tuple[_Candidate, LoRAAdapter]]:
    """Make a chunk's adapters without touching it, so that a refusal leaves it as it was."""
    facts = model_facts(chunk)
    _refuse_left_out(candidates, config)
    chosen = [c for c in candidates if not c.left_out and matching_target(c.name, config.targets)]
    if chosen:
        _refuse_bypasses(chunk, chosen)
    return [(c, _make_adapter(c, config, facts, chunk.config)) for c in chosen]


def _attach(pairs: list[tuple[_Candidate, LoRAAdapter]]) -> None:
    for candidate, adapter in pairs:
        adapter.reset_parameters()
        candidate.parent.add_module(candidate.leaf + ADAPTER_SUFFIX, adapter)
        adapter.bind()


def _make_adapter(
    candidate: _Candidate, config: LoRAConfig, facts: ModelFacts, model_config: TransformerConfig
) -> LoRAAdapter:
    base = candidate.base
    spec = plan(
        candidate.name,
        base.out_features,
        config,
        facts,
        is_expert=base.is_expert,
        parts=parts_of(candidate.parent) if candidate.leaf in IN_PARTS else None,
    )
    weight = next(base.module.parameters(), None)
    device = torch.device(torch.cuda.current_device()) if weight is None else weight.device
    return ADAPTERS[base.style](
        base,
        spec,
        config,
        dtype=model_config.params_dtype,
        device=device,
        dense_group=_process_group(parallel_state.get_tensor_model_parallel_group()),
        expert_group=(
            _process_group(parallel_state.get_expert_model_parallel_group())
            if base.is_expert
            else None
        ),
    )


def _warn_of_wide_ranks(adapters: Iterable[LoRAAdapter]) -> None:
    """Say where a lower rank would hold every update that the adapter can."""
    for adapter in adapters:
        spec, num_in = adapter.spec, adapter.base.in_features
        limit = min(max(spec.rows.by_projection), num_in)
        if spec.rank > limit:
            _say(
                f"WARNING: rank {spec.rank} of {spec.adapter_name} is above {limit}, which no "
                "update of its base exceeds: what is above only takes memory and time; lower "
                "--lora-rank, or --lora-expert-rank"
            )
            return


def _process_group(group: object) -> ProcessGroup | None:
    return group if isinstance(group, ProcessGroup) and group.size() > 1 else None


def _refuse_left_out(candidates: list[_Candidate], config: LoRAConfig) -> None:
    """Raise ValueError where a name or a pattern asks for what a preset leaves out."""
    named = [target for target in config.targets if target not in PRESETS]
    for candidate in candidates:
        if candidate.left_out and matching_target(candidate.name, named):
            raise ValueError(
                f"lora_targets select {candidate.name}: {candidate.left_out}; use --lora-targets "
                f"attn, which leaves {candidate.leaf} out, or names of the other linears"
            )


def _tell_left_out(candidates: list[_Candidate], config: LoRAConfig) -> None:
    """Say once what the targets select and no adapter could train."""
    own = {
        f"{c.leaf} has no adapter: {c.left_out}"
        for c in candidates
        if c.left_out and matching_target(c.name, config.targets)
    }
    for sentence in sorted(union(own, _world())):
        _say(sentence)


def _say(sentence: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(sentence, flush=True)


def _refuse_bypasses(chunk: torch.nn.Module, chosen: list[_Candidate]) -> None:
    for candidate in chosen:
        if candidate.leaf in PROJECTIONS and parts_of(candidate.parent) is None:
            raise ValueError(
                f"lora_targets select {candidate.name} of {type(candidate.parent).__name__}: of "
                f"{' and '.join(PROJECTIONS)}, only those of Mamba-2 (MambaMixer) and of gated "
                "delta nets (GatedDeltaNet) have adapters; use names of the linears that you want"
            )
    bases = {candidate.base.module for candidate in chosen}
    for name, module in chunk.named_modules():
        reason = refusal(module)
        if reason is not None and not bases.isdisjoint(module.modules()):
            raise ValueError(f"lora_targets select linears of {name}: {reason}")
