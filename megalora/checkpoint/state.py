"""Adapter checkpoints: only adapters are saved, and they load on any parallel layout.

A model chunk with adapters gives Megatron's checkpointing its adapters and nothing else. While a
base checkpoint is read (Megatron enters `hide_loss_modules` when it starts from a pretrained
checkpoint) it gives its base and nothing else, so any base checkpoint loads unchanged.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from megalora.adapters.adapter import LoRAAdapter, named_adapters
from megalora.adapters.finite import all_finite, refuse
from megalora.checkpoint.description import HUGGING_FACE, parse_description, read_facts
from megalora.checkpoint.read import DESCRIPTION
from megalora.config import LoRAConfig
from megalora.targets import ModelFacts, is_adapter_key


def install_checkpointing(
    chunk: Any, config: LoRAConfig, facts: ModelFacts, sizes: Mapping[str, Any]
) -> None:
    """Make a model chunk save and load its adapters, or its base while that is asked for.

    sizes: what `megalora.checkpoint.description.read_sizes` is to return.
    """
    chunk.megalora_description = {
        "config": config.to_dict(),
        "model": asdict(facts),
        HUGGING_FACE: dict(sizes),
    }
    chunk.hide_loss_modules = functools.partial(_base_only, chunk)
    chunk.sharded_state_dict = functools.partial(
        _sharded_state_dict, chunk, chunk.sharded_state_dict
    )
    chunk.state_dict_for_save_checkpoint = functools.partial(_adapter_state_dict, chunk)
    chunk.load_state_dict = functools.partial(_load_state_dict, chunk, chunk.load_state_dict)


def describe_base(model_chunks: Sequence[Any], base: Mapping[str, Any]) -> None:
    """Store what the base is with every later checkpoint of these chunks' adapters."""
    for chunk in model_chunks:
        chunk.megalora_description["base"] = dict(base)


def describe_model(model_chunks: Sequence[Any], sizes: Mapping[str, Any]) -> None:
    """Store more of what `read_sizes` returns with every later checkpoint of these chunks."""
    for chunk in model_chunks:
        chunk.megalora_description[HUGGING_FACE] |= sizes


@contextlib.contextmanager
def _base_only(chunk: Any) -> Iterator[None]:
    chunk.megalora_base_only = True
    try:
        yield
    finally:
        chunk.megalora_base_only = False


def _sharded_state_dict(
    chunk: Any, base: Callable[..., dict], *args: object, **kwargs: object
) -> dict[str, Any]:
    if getattr(chunk, "megalora_base_only", False):
        return base(*args, **kwargs)
    found: dict[str, Any] = {}
    for local, module in chunk.named_modules():
        if isinstance(module, LoRAAdapter):
            sharded = module.sharded_tensors(f"{module.spec.adapter_name}.")
            # Megatron loads by the chunk's own names; the checkpoint has global ones.
            found |= {
                f"{local}.{key.rpartition('.')[2]}": tensor for key, tensor in sharded.items()
            }
    return {**found, DESCRIPTION: json.dumps(chunk.megalora_description)}


def _adapter_state_dict(chunk: Any, *args: object, **kwargs: object) -> dict[str, Any]:
    state = chunk.state_dict(*args, **kwargs)
    return {key: value for key, value in state.items() if is_adapter_key(key)}


def _load_state_dict(
    chunk: Any,
    load_module: Callable[..., Any],
    state_dict: Mapping[str, Any],
    strict: bool = True,
    **kwargs: object,
) -> Any:
    """Load either part of the model; whatever `strict` is, an adapter is loaded whole or not."""
    state = dict(state_dict)
    stored = state.pop(DESCRIPTION, None)
    if stored is not None:
        check_same_adapters(parse_description(stored), chunk.megalora_description)
    has_adapters = any(is_adapter_key(key) for key in state)
    result = load_module(state, strict=False, **kwargs)
    missing = [key for key in result.missing_keys if is_adapter_key(key) == has_adapters]
    missing = [key for key in missing if not key.endswith("_extra_state")]
    unexpected = [key for key in result.unexpected_keys if not key.endswith("_extra_state")]
    if (missing or unexpected) and (strict or has_adapters):
        part = "adapter" if has_adapters else "base"
        raise ValueError(
            f"{part} checkpoint does not fit the model: missing {missing[:5]}, "
            f"unexpected {unexpected[:5]}"
        )
    if stored is not None:
        refuse_not_finite(
            [chunk],
            "checkpoint to go on from has NaN or infinite values in {}: give one from before "
            "training diverged by --ckpt-step, with a lower --lr".format,
        )
    return result


def refuse_not_finite(
    model_chunks: Sequence[torch.nn.Module], sentence: Callable[[str], str]
) -> None:
    """Raise ValueError on all ranks, which must all call it, where an adapter is not finite.

    sentence: makes the message of the names of what is not, each with its rank.
    """
    rank = dist.get_rank()
    names = {
        f"{name}.{sharding.factor.name} on rank {rank}"
        for name, adapter in named_adapters(model_chunks)
        for param, sharding in adapter.factors()
        if not all_finite(param)
    }
    refuse(names, sentence)


def check_same_adapters(stored: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint's adapters are not those of this run, naming fields.

    Fields that may change between runs (dropout, learning rates, epsilons, backend) are ignored.
    """
    fixed = (
        *("kind", "rank", "alpha", "targets", "expert_rank", "expert_mode", "shared_a"),
        *("rslora", "init"),
    )
    # Checkpoints from before a field was made have its default.
    ours, theirs = (LoRAConfig.from_dict(one["config"]).to_dict() for one in (given, stored))
    wrong = [
        f"lora_{name} is {ours[name]!r} but the checkpoint has {theirs[name]!r}"
        for name in fixed
        if _unordered(ours[name]) != _unordered(theirs[name])
    ]
    own, other = (asdict(read_facts(one)) for one in (given, stored))
    wrong += [
        f"{name} is {own[name]!r} but the checkpoint's model has {value!r}"
        for name, value in other.items()
        if own[name] != value
    ]
    if wrong:
        raise ValueError(
            "; ".join(wrong) + ": resume with the checkpoint's values, or start anew from another "
            "--save directory"
        )


def _unordered(value: object) -> object:
    return set(value) if isinstance(value, list) else value
