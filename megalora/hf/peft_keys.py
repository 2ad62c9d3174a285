"""The keys of an adapter's tensors: PEFT's own, and those that wrappers and other savers leave.

PEFT writes `base_model.model.<module>.lora_A.weight`, `<module>` being the base's name of it. The
same is read where a wrapper (torch.compile, FSDP, DDP, DeepSpeed, Lightning) has added its name to
that, where `base_model.model.` is missing or there twice, with the name of the one adapter that the
file holds, and where the language model was trained by itself or as a part of a multimodal one.
"""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megalora.hf.factors import summarise
from megalora.hf.files import TensorFiles, read_tensors
from megalora.hf.foreign import cause_of
from megalora.hf.stacked_experts import from_tinker_name, is_stacked, to_tinker_name
from megalora.hf.whole_layers import ZERO_3
from megalora.printable import printable

_WRAPPERS = {
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module",
    "_ddp_module", "module", "pretrained_model",
}  # fmt: skip
_PEFT = ["base_model", "model"]
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
# The language model, by itself or as the part of another.
_LANGUAGE = re.compile(
    r"((?:(?:model|language_model|text_model|llm|thinker|backbone)\.)*)"
    r"(?:(layers\.\d+\..+|embed_tokens|embeddings|norm|norm_f)|(lm_head))"
)
# A layer that PEFT copied, for its adapter to be around or to be trained in place of it.
_WHOLE = re.compile(
    r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(weight|bias)(?:\.default)?"
)
# What only training needs: the layer that a copy replaces, states of variants, and old buffers.
_IGNORED = re.compile(
    r".*\.(original_module\..+|lora_velora_embed\b.*|lora_monteclora_sampler\..+"
    r"|rotary_emb\.inv_freq)"
)
# What PEFT names by itself for models that classify, whether they have it or not.
_OF_CLASSES = ("classifier", "score")
_MODULE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")


@dataclass(slots=True)
class AdapterKeys:
    """What a file's keys name.

    pairs: key of A and key of B by the module's name, such as `model.layers.0.self_attn.q_proj`.
    whole: key by the name of the base's tensor, such as `model.embed_tokens.weight`.
    prefix: what the modules' names have in the file for `model.`.
    """

    pairs: dict[str, dict[str, str]] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    prefix: str = "model."


def read_keys(keys: Iterable[str], *, language: str = "") -> AdapterKeys:
    """Sort an adapter's keys; says in one warning where they were not PEFT's own.

    language: what the base's family may have for `model.` as a part of a multimodal model.
    Raises ValueError where a file holds several adapters, names with several prefixes, or a factor
    twice.
    """
    found = AdapterKeys()
    names: dict[str, str] = {}
    prefixes: dict[str, str] = {}
    for key in keys:
        plain = without_wrappers(key)
        factor = _FACTOR.fullmatch(plain)
        if factor and _MODULE.fullmatch(factor.group(1)):
            name, prefix = _canonical(from_tinker_name(factor.group(1)))
            pair = found.pairs.setdefault(name, {})
            names.setdefault(factor.group(3) or "", key)
            if prefix is not None:
                prefixes.setdefault(prefix, key)
            _add(pair, factor.group(2), key)
        elif _IGNORED.fullmatch(plain):
            continue
        elif (whole := _WHOLE.fullmatch(plain)) and not cause_of(plain):
            name, _ = _canonical(whole.group(1))
            _add(found.whole, f"{name}.{whole.group(2)}", key)
        else:
            found.unknown.append(key)
    _check_one("adapters, by name", names, "save each by itself, by PEFT's save_pretrained")
    _check_one("prefixes", prefixes, "they are of several models: save the adapter of one of them")
    found.prefix = next(iter(prefixes), "model.")
    if not language or found.prefix != language:
        _say_renamed(found)
    return found


def without_wrappers(key: str) -> str:
    """Return a name without what wrappers and PEFT put into it."""
    parts = [part for part in key.split(".") if part not in _WRAPPERS]
    while parts[:2] == _PEFT:
        parts = parts[2:]
    return ".".join(parts)


def _canonical(name: str) -> tuple[str, str | None]:
    """Return a module's name as a causal language model has it, and what it had for `model.`."""
    found = _LANGUAGE.fullmatch(name)
    if found is None:
        return name, None
    if found.group(3):
        return found.group(3), None
    return f"model.{found.group(2)}", found.group(1)


def _add(keys: dict[str, str], name: str, key: str) -> None:
    if name in keys:
        raise ValueError(
            f"adapter has one tensor under two keys, {keys[name]} and {key}: save it again, by "
            "PEFT's save_pretrained"
        )
    keys[name] = key


def _check_one(what: str, found: dict[str, str], advice: str) -> None:
    if len(found) > 1:
        shown = [f"{printable(name, 100) or 'none'} ({key})" for name, key in found.items()]
        raise ValueError(f"adapter has keys of several {what}: {summarise(shown)}: {advice}")


def _say_renamed(found: AdapterKeys) -> None:
    """Warn where keys are not those that PEFT writes, which it would not load or elsewhere."""
    for name, pair in found.pairs.items():
        wanted = f"base_model.model.{name}.lora_A.weight"
        tinker = f"base_model.model.{to_tinker_name(name)}.lora_A.weight"
        if pair.get("A", wanted) not in (wanted, tinker):
            warnings.warn(
                f"adapter has keys such as {printable(pair['A'], 200)}, read as {wanted}",
                stacklevel=5,
            )
            return


def check_keys(
    keys: AdapterKeys, config: Mapping[str, Any], on_problem: Callable[[str], None] | None
) -> None:
    """Raise ValueError for tensors that no rule knows, saying whose they are where that is known.

    on_problem: told instead.
    """
    _check_saved(config.get("modules_to_save"), keys)
    if keys.unknown:
        causes = filter(None, map(cause_of, keys.unknown))
        known = next(causes, "only `<module>.lora_A.weight` and `<module>.lora_B.weight` are read")
        message = (
            f"adapter has tensors that are no LoRA factors: {summarise(keys.unknown)}: {known}"
        )
        if on_problem is None or not keys.pairs:
            raise ValueError(message)
        on_problem(message)


def _check_saved(modules: object, keys: AdapterKeys) -> None:
    """Raise ValueError where modules that were trained whole are not in the file."""
    named = modules if isinstance(modules, list) else [modules] if modules else []
    saved = [f".{name}." for name in keys.whole]
    missing = [
        str(module)
        for module in named
        if module not in _OF_CLASSES and not any(f".{module}." in name for name in saved)
    ]
    if missing:
        raise ValueError(
            f"adapter_config modules_to_save has {summarise(missing)}, whose weights are not in "
            "the file: PEFT would not load it: save the adapter again"
        )


def read_pairs(files: TensorFiles, keys: AdapterKeys) -> dict[str, tuple[Tensor, Tensor]]:
    """Read A and B of every module; ValueError where one is missing, or is a part of itself."""
    alone = [name for name, pair in keys.pairs.items() if len(pair) != 2]
    if alone:
        raise ValueError(
            f"{files.directory} has one of lora_A and lora_B of {summarise(alone)}: it was saved "
            "in part: save it again"
        )
    if not keys.pairs:
        raise ValueError(f"{files.directory} has no LoRA factors")
    tensors = read_tensors(files, (key for pair in keys.pairs.values() for key in pair.values()))
    pairs = {name: (tensors[pair["A"]], tensors[pair["B"]]) for name, pair in keys.pairs.items()}
    _check_whole(pairs)
    return pairs


def _check_whole(pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Raise ValueError for parts of factors, which a rank had of them."""
    parts = {
        f"{name}.lora_{end} {list(factor.shape)}"
        for name, pair in pairs.items()
        for end, factor in zip("AB", pair, strict=True)
        if (factor.numel() == 0 or factor.dim() == 1) and not is_stacked(name)
    }
    if parts:
        raise ValueError(
            f"adapter has factors that are no matrices: {summarise(sorted(parts))}: expected 2-D, "
            f"with values: {ZERO_3}"
        )
