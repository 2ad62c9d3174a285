"""PEFT adapter directories, written and read."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from megalora.hf.adapter_config import AdaptedBase, adapter_config
from megalora.hf.directories import whole_directory
from megalora.hf.factors import LoRAFactors, check_factors, check_tensors
from megalora.hf.files import (
    ADAPTER,
    Planned,
    TensorFiles,
    read_json,
    save_tensors,
    write_json,
)
from megalora.hf.foreign import CONFIG_NAME, refuse_foreign
from megalora.hf.peft_config import (
    PeftRules,
    check_ranks,
    layer_of,
    read_rules,
    split_expert,
)
from megalora.hf.peft_experts import Experts, complete_experts, join_3d
from megalora.hf.peft_experts_in import Pair, split_3d
from megalora.hf.peft_keys import check_keys, read_keys, read_pairs
from megalora.hf.peft_targets import check_targets
from megalora.hf.stacked_experts import (
    is_stacked,
    join_tinker,
    split_stacked,
    to_tinker_name,
)
from megalora.hf.uniform import at_one_scale, uniform_tensors
from megalora.hf.untrained import without_blanks
from megalora.hf.whole_layers import check_without_base, refuse_trained, trained_layers
from megalora.model.family import DEFAULT_NAMES, Names, without_numbers

Format = Literal["peft", "uniform", "peft-3d", "tinker"]
FORMATS: tuple[str, ...] = get_args(Format)
_PREFIX = "base_model.model."
# Modules that read the hidden state.
_READ_HIDDEN = (
    *("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    *("in_proj_qkv", "in_proj_z", "in_proj_qkvz", "lm_head"),
)


@dataclass(frozen=True, slots=True)
class AdapterDirectory:
    """What a PEFT directory holds: its factors, its configuration, and whole layers beside them.

    whole: key in `files` by the name of the base's tensor.
    """

    factors: dict[str, LoRAFactors]
    config: dict[str, Any]
    rules: PeftRules
    files: TensorFiles
    whole: dict[str, str]

    def trained_layers(self, base: str | os.PathLike[str]) -> dict[str, Tensor]:
        """Return the whole layers that are not those of the base, by the name of its tensor."""
        return trained_layers(self.files, self.whole, Path(base))


def write_adapter(
    directory: str | os.PathLike[str],
    factors: Mapping[str, LoRAFactors],
    *,
    base_model_name: str,
    format: Format = "peft",
    names: Names = DEFAULT_NAMES,
    num_layers: int | None = None,
    num_experts: int | None = None,
    moe_layers: Collection[int] | None = None,
    delta_layers: Collection[int] = (),
    overwrite: bool = False,
) -> None:
    """Write a PEFT adapter directory, whole or not at all.

    factors: by Hugging Face module name, such as `model.layers.0.self_attn.q_proj`.
    format: `peft` for PEFT and vLLM, with the experts' rank as `r` and patterns for the rest;
        `uniform` has one rank and folds every scale into B in fp32, for servers that ignore
        patterns; `peft-3d` has the experts of a layer in one tensor; `tinker` is `uniform` but
        for the scale, has the experts of a layer in one tensor with what they share once, and is
        for Tinker and SGLang, not for PEFT.
    names: of the base's family.
    num_layers, num_experts: of the base; where left out, the highest numbers in `factors` count.
    moe_layers: those with experts; where left out, all that have no adapter of a dense MLP.
    delta_layers: those that are gated delta nets.
    Raises ValueError for values that are not finite, and for what the format cannot say.
    """
    _check_writable(factors, format)
    is_moe = bool(num_experts)
    base = adapted_base(factors, names, num_layers, moe_layers, delta_layers, is_moe=is_moe)
    tensors, config = adapter_files(factors, format, base, num_experts)
    with whole_directory(directory, overwrite=overwrite) as target:
        save_tensors(target / f"{ADAPTER}.safetensors", tensors)
        write_json(target / CONFIG_NAME, {"base_model_name_or_path": base_model_name, **config})


def adapter_files(
    factors: Mapping[str, LoRAFactors],
    format: Format,
    base: AdaptedBase,
    num_experts: int | None,
    *,
    one: tuple[int, float] | None = None,
) -> tuple[dict[str, Tensor | Planned], dict[str, Any]]:
    """Return what a format has of these adapters: tensors by key, and the configuration.

    one: the rank and the scale that `uniform` and `tinker` give all, where these are whole layers
        of an adapter that has more. The configuration is then theirs alone.
    """
    if format == "tinker":
        factors = at_one_scale(factors, one)
        check_factors(factors)
    agree = format != "uniform"
    experts = complete_experts(
        factors,
        base.moe_layers,
        num_experts,
        names=base.names,
        must_agree=agree,
    )
    dense = {name: module for name, module in factors.items() if not split_expert(name)}
    tensors = _tensors(dense, experts, format, one and one[0])
    config = adapter_config(dense, experts, format, base)
    names = base.names
    return {_PREFIX + names.as_adapted(key): tensor for key, tensor in tensors.items()}, config


def adapted_base(
    modules: Collection[str],
    names: Names,
    num_layers: int | None,
    moe_layers: Collection[int] | None,
    delta_layers: Collection[int],
    *,
    is_moe: bool,
) -> AdaptedBase:
    """Return what is known of a base whose modules have these adapters; see `write_adapter`."""
    layers = [layer for name in modules if (layer := layer_of(name)) is not None]
    num_layers = num_layers or max(layers, default=-1) + 1
    if moe_layers is None:
        mlp = {*names.in_layer("mlp.linear_fc1"), *names.in_layer("mlp.linear_fc2")}
        dense = {layer_of(name) for name in modules if without_numbers(name)[0] in mlp}
        moe_layers = set(range(num_layers)) - dense
    beside = {*names.in_layer("mlp.router"), *names.in_layer("mlp.shared_experts.linear_fc1")}
    beside |= {*names.in_layer("mlp.shared_experts.linear_fc2")}
    is_moe |= any(split_expert(name) or without_numbers(name)[0] in beside for name in modules)
    return AdaptedBase(num_layers, sorted(moe_layers), is_moe, names, sorted(delta_layers))


def _tensors(
    dense: Mapping[str, LoRAFactors], experts: Experts | None, format: str, rank: int | None
) -> dict[str, Tensor | Planned]:
    of_experts = experts.factors if experts else {}
    if format == "uniform":
        return {**uniform_tensors({**dense, **of_experts}, rank)}
    if format == "tinker":
        dense = {to_tinker_name(name): module for name, module in dense.items()}
    join = {"peft-3d": join_3d, "tinker": join_tinker}.get(format)
    return {**_flat(dense), **(join(experts) if experts and join else _flat(of_experts))}


def _check_writable(factors: Mapping[str, LoRAFactors], format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"adapter format is {format!r}: must be one of {', '.join(FORMATS)}")
    if not factors:
        raise ValueError("adapter has no factors: nothing to write")
    check_factors(factors)


def read_adapter(
    directory: str | os.PathLike[str],
    *,
    names: Names = DEFAULT_NAMES,
    hidden_size: int | None = None,
    base: str | os.PathLike[str] | None = None,
) -> dict[str, LoRAFactors]:
    """Return the factors of a PEFT directory by Hugging Face module name.

    names: of the base's family, by which the modules are named whose names PEFT has changed.
    hidden_size: of the base, only needed for 3-D adapters of one expert parameter.
    base: directory of the base, only needed where there are whole layers beside the factors.
    Raises ValueError for whatever plain LoRA factors cannot represent, and for broken files.
    """
    found = read_adapter_directory(directory, names=names, hidden_size=hidden_size)
    if base is None:
        check_without_base(found.whole)
    else:
        refuse_trained(found.trained_layers(base))
    return found.factors


def read_adapter_directory(
    directory: str | os.PathLike[str],
    *,
    names: Names = DEFAULT_NAMES,
    hidden_size: int | None = None,
    on_problem: Callable[[str], None] | None = None,
) -> AdapterDirectory:
    """Read a PEFT directory with its configuration; see `read_adapter`.

    on_problem: told of unknown tensors and of values that are not finite, instead of ValueError.
    """
    path = Path(directory)
    refuse_foreign(path)
    config = read_json(path / CONFIG_NAME)
    rules = read_rules(config)
    files = TensorFiles(path, ADAPTER)
    keys = read_keys(files, language=names.language)
    check_keys(keys, config, on_problem)
    rules = replace(rules, prefix=keys.prefix)
    factors = _factors(read_pairs(files, keys), config, rules, names, hidden_size, on_problem)
    try:
        check_factors(factors)
    except ValueError as error:
        if on_problem is None:
            raise
        on_problem(str(error))
    whole = {names.as_stored(name): key for name, key in keys.whole.items()}
    return AdapterDirectory(without_blanks(factors), config, rules, files, whole)


def _factors(
    pairs: dict[str, Pair],
    config: Mapping[str, Any],
    rules: PeftRules,
    names: Names,
    hidden_size: int | None,
    on_problem: Callable[[str], None] | None,
) -> dict[str, LoRAFactors]:
    """Return factors of single modules, by the family's names for them."""
    stacked = {name: pairs.pop(name) for name in list(pairs) if is_stacked(name)}
    for number, end in enumerate(("lora_A", "lora_B")):
        check_tensors({f"{name}.{end}": _matrix(name, p[number]) for name, p in pairs.items()})
    of_parameters = {name: pair for name, pair in pairs.items() if _is_3d(name)}
    dense = {name: pair for name, pair in pairs.items() if name not in of_parameters}
    ranks = {name: int(a.shape[0]) for name, (a, _) in dense.items()}
    check_ranks(ranks, rules)
    check_targets(config, {name: rules.stored(name) for name in pairs}, on_problem)
    factors = {name: LoRAFactors(a, b, rules.scale(name)) for name, (a, b) in dense.items()}
    factors |= split_stacked(stacked, rules, names.projections)
    if of_parameters:
        hidden_size = hidden_size or _hidden_size(factors)
        factors |= split_3d(of_parameters, rules, config, hidden_size, names)
    return {names.as_stored(name): module for name, module in factors.items()}


def _matrix(name: str, factor: Tensor) -> Tensor:
    return factor.flatten(0, 1) if _is_3d(name) and factor.dim() == 3 else factor


def _is_3d(name: str) -> bool:
    return name.removesuffix(".base_layer").endswith(".experts")


def _hidden_size(factors: Mapping[str, LoRAFactors]) -> int | None:
    sizes = [m.lora_A.shape[1] for name, m in factors.items() if name.endswith(_READ_HIDDEN)]
    return sizes[0] if sizes else None


def _flat(factors: Mapping[str, LoRAFactors]) -> dict[str, Tensor | Planned]:
    flat: dict[str, Tensor | Planned] = {}
    for name, module in factors.items():
        flat[f"{name}.lora_A.weight"] = module.lora_A
        flat[f"{name}.lora_B.weight"] = module.lora_B
    return flat
