"""PEFT adapter directories, written and read."""

import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megalora.hf.directories import whole_directory
from megalora.hf.factors import LoRAFactors, check_factors, check_tensors, summarise
from megalora.hf.files import (
    ADAPTER,
    TensorFiles,
    read_json,
    save_tensors,
    write_json,
)
from megalora.hf.patterns import matches
from megalora.hf.peft_config import (
    PeftRules,
    check_ranks,
    choose_patterns,
    layer_of,
    most_common,
    read_rules,
    split_expert,
    target_modules,
)
from megalora.hf.peft_experts import (
    DOWN,
    GATE_UP,
    PROJECTIONS,
    Experts,
    complete_experts,
    join_3d,
    split_3d,
)

Format = Literal["peft", "uniform", "peft-3d"]
FORMATS: tuple[str, ...] = get_args(Format)
CONFIG_NAME = "adapter_config.json"
_PREFIX = "base_model.model."
_CONSTANT_FIELDS: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "lora_dropout": 0.0,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
}
_KEY = re.compile(r"base_model\.model\.([A-Za-z_]\w*(?:\.\w+)*)\.lora_([AB])\.weight")
_DENSE = re.compile(rf"model\.layers\.\d+\.mlp\.({'|'.join(PROJECTIONS)})")
# PEFT saves the frozen base of a targeted unembedding along with its adapter.
_BASE_COPIES = re.compile(r"base_model\.model\.(.*\.)?(lm_head|embed_tokens)\.base_layer\.weight")


@dataclass(frozen=True, slots=True)
class AdapterDirectory:
    """What a PEFT directory holds: its factors and its configuration."""

    factors: dict[str, LoRAFactors]
    config: dict[str, Any]
    rules: PeftRules


def write_adapter(
    directory: str | os.PathLike[str],
    factors: Mapping[str, LoRAFactors],
    *,
    base_model_name: str,
    format: Format = "peft",
    num_layers: int | None = None,
    num_experts: int | None = None,
    moe_layers: Collection[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a PEFT adapter directory, whole or not at all.

    factors: by Hugging Face module name, such as `model.layers.0.self_attn.q_proj`.
    format: `peft` for PEFT and vLLM, with the experts' rank as `r` and patterns for the rest;
        `uniform` has one rank and folds every scale into B in fp32, for servers that ignore
        patterns; `peft-3d` has the experts of a layer in one tensor.
    num_layers, num_experts: of the base; where left out, the highest numbers in `factors` count.
    moe_layers: those with experts; where left out, all that have no adapter of a dense MLP.
    Raises ValueError for values that are not finite, and for what the format cannot say.
    """
    _check_writable(factors, format)
    layers = [layer for name in factors if (layer := layer_of(name)) is not None]
    num_layers = num_layers or max(layers, default=-1) + 1
    if format == "uniform":
        factors = make_uniform(factors)
        # Folding a scale into B can carry it out of fp32, where scale * B @ A is not.
        check_factors(factors)
    if moe_layers is None:
        moe_layers = set(range(num_layers)) - {layer_of(n) for n in factors if _DENSE.fullmatch(n)}
    experts = complete_experts(factors, moe_layers=sorted(moe_layers), num_experts=num_experts)
    dense = {name: module for name, module in factors.items() if not split_expert(name)}
    tensors = _flat(dense)
    if experts:
        tensors |= join_3d(experts) if format == "peft-3d" else _flat(experts.factors)
    config = _config(dense, experts, format, base_model_name, num_layers)
    with whole_directory(directory, overwrite=overwrite) as target:
        prefixed = {_PREFIX + key: tensor for key, tensor in tensors.items()}
        save_tensors(target / f"{ADAPTER}.safetensors", prefixed)
        write_json(target / CONFIG_NAME, config)


def _check_writable(factors: Mapping[str, LoRAFactors], format: str) -> None:
    if format not in FORMATS:
        raise ValueError(f"adapter format is {format!r}: must be one of {', '.join(FORMATS)}")
    if not factors:
        raise ValueError("adapter has no factors: nothing to write")
    check_factors(factors)


def make_uniform(factors: Mapping[str, LoRAFactors]) -> dict[str, LoRAFactors]:
    """Return the same updates at the largest rank and scale 1, scales folded into B in fp32.

    B keeps its own precision only where that loses nothing.
    """
    rank = max(module.rank for module in factors.values())
    uniform: dict[str, LoRAFactors] = {}
    for name, module in factors.items():
        one = module.rescaled(1.0).resized(rank)
        short = one.lora_B.to(module.lora_B.dtype)
        lossless = torch.equal(short.to(one.lora_B.dtype), one.lora_B)
        uniform[name] = LoRAFactors(one.lora_A, short if lossless else one.lora_B, 1.0)
    return uniform


def read_adapter(
    directory: str | os.PathLike[str], *, hidden_size: int | None = None
) -> dict[str, LoRAFactors]:
    """Return the factors of a PEFT directory by Hugging Face module name.

    hidden_size: of the base, only needed for 3-D adapters of one expert parameter.
    Raises ValueError for whatever plain LoRA factors cannot represent, and for broken files.
    """
    return read_adapter_directory(directory, hidden_size=hidden_size).factors


def read_adapter_directory(
    directory: str | os.PathLike[str],
    *,
    hidden_size: int | None = None,
    on_problem: Callable[[str], None] | None = None,
) -> AdapterDirectory:
    """Read a PEFT directory with its configuration; see `read_adapter`.

    on_problem: told of unknown tensors and of values that are not finite, instead of ValueError.
    """
    path = Path(directory)
    config = read_json(path / CONFIG_NAME)
    rules = read_rules(config)
    pairs = _read_pairs(TensorFiles(path, ADAPTER), on_problem)
    for number, end in enumerate(("lora_A", "lora_B")):
        check_tensors({f"{name}.{end}": pair[number] for name, pair in pairs.items()})
    stacked = {name: pair for name, pair in pairs.items() if _is_3d(name)}
    dense = {name: pair for name, pair in pairs.items() if name not in stacked}
    ranks = {name: int(a.shape[0]) for name, (a, _) in dense.items()}
    check_ranks(ranks, rules)
    factors = {name: LoRAFactors(a, b, rules.scale(name)) for name, (a, b) in dense.items()}
    if stacked:
        factors |= split_3d(stacked, rules, config, hidden_size or _hidden_size(factors))
    try:
        check_factors(factors)
    except ValueError as error:
        if on_problem is None:
            raise
        on_problem(str(error))
    return AdapterDirectory(factors, config, rules)


def _read_pairs(
    files: TensorFiles, on_problem: Callable[[str], None] | None
) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for key in files:
        match = _KEY.fullmatch(key)
        if match:
            found.setdefault(match.group(1), {})[match.group(2)] = key
        elif not _BASE_COPIES.fullmatch(key):
            unknown.append(key)
    if unknown:
        message = (
            f"{files.directory} has tensors that are no LoRA factors: {summarise(unknown)}: "
            "only `<module>.lora_A.weight` and `<module>.lora_B.weight` can be read"
        )
        if on_problem is None:
            raise ValueError(message)
        on_problem(message)
    alone = [name for name, pair in found.items() if len(pair) != 2]
    if alone:
        raise ValueError(f"{files.directory} has one of lora_A and lora_B of {summarise(alone)}")
    if not found:
        raise ValueError(f"{files.directory} has no LoRA factors")
    return {
        name: (files.tensor(pair["A"]), files.tensor(pair["B"])) for name, pair in found.items()
    }


def _is_3d(name: str) -> bool:
    return name.removesuffix(".base_layer").endswith(".experts")


def _hidden_size(factors: Mapping[str, LoRAFactors]) -> int | None:
    inputs = ("q_proj", "k_proj", "v_proj", "lm_head")
    sizes = [m.lora_A.shape[1] for name, m in factors.items() if name.endswith(inputs)]
    return sizes[0] if sizes else None


def _flat(factors: Mapping[str, LoRAFactors]) -> dict[str, Tensor]:
    flat: dict[str, Tensor] = {}
    for name, module in factors.items():
        flat[f"{name}.lora_A.weight"] = module.lora_A
        flat[f"{name}.lora_B.weight"] = module.lora_B
    return flat


def _config(
    dense: Mapping[str, LoRAFactors],
    experts: Experts | None,
    format: str,
    base_model_name: str,
    num_layers: int,
) -> dict[str, Any]:
    wanted = {name: (module.rank, _alpha(module)) for name, module in dense.items()}
    # NOTE: PEFT takes the rank of stacked experts from `r` and ignores patterns there, so `r` is
    # the expert rank wherever there are experts.
    if experts:
        alpha = _alpha(next(iter(experts.factors.values())))
        default = (experts.rank, alpha)
    else:
        default = most_common(wanted.values())
    rank_pattern, alpha_pattern = choose_patterns(wanted, default)
    # NOTE: PEFT with transformers 5 takes these names for experts and drops them, beside experts.
    # It wraps their weights as it does those of experts, under the same names in the file.
    hidden = [name for name in dense if experts and name.endswith(PROJECTIONS)]
    rank_pattern, alpha_pattern = (_of_weights(p, hidden) for p in (rank_pattern, alpha_pattern))
    targets = target_modules([name for name in dense if name not in hidden], num_layers)
    parameters = [f"{name}.weight" for name in hidden]
    if experts and format == "peft-3d":
        infix = experts.prefixes[0].split(".", 3)[3]
        parameters += [f"{infix}.{GATE_UP}", f"{infix}.{DOWN}"]
        pattern = f"{infix}.{GATE_UP}".replace(".", "\\.")
        rank_pattern[pattern] = 2 * experts.rank
        alpha_pattern[pattern] = _whole(2 * default[1])
    elif experts:
        targets += [name for name in PROJECTIONS if name not in targets]
    return {
        **_CONSTANT_FIELDS,
        "base_model_name_or_path": base_model_name,
        "r": default[0],
        "lora_alpha": default[1],
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "target_modules": sorted(targets),
        "target_parameters": parameters or None,
    }


def _of_weights(patterns: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Let the patterns of these modules match the names of their weights too."""
    return {
        rf"{pattern}(\.weight)?"
        if any(matches(pattern, name) for name in names)
        else pattern: value
        for pattern, value in patterns.items()
    }


def _alpha(module: LoRAFactors) -> float:
    return _whole(module.scale * module.rank)


def _whole(value: float) -> float:
    """Return a number as an integer where only rounding keeps it from being one."""
    return round(value) if abs(value - round(value)) <= 1e-12 * abs(value) else value
