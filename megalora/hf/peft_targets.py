"""Which modules an adapter_config.json names: PEFT leaves the factors of all others out."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import re2

from megalora.hf.factors import summarise
from megalora.hf.peft_config import layer_of
from megalora.hf.peft_keys import without_wrappers
from megalora.hf.stacked_experts import to_tinker_name
from megalora.model.families import spellings

_MAX_PATTERN = 4000
type _Selects = Callable[[Iterable[str]], bool]


def check_targets(
    config: Mapping[str, Any],
    names: Mapping[str, str],
    on_problem: Callable[[str], None] | None = None,
) -> None:
    """Raise ValueError where a configuration leaves modules out that have factors.

    names: of the modules here -> in the file. Experts' are not looked at: PEFT names them anew. Nor
    is a pattern that cannot be matched in bounded time. on_problem: told instead.
    """
    excluded = _selector(config.get("exclude_modules"), unknown=False)
    targeted, layers = _targets(config), _layers(config.get("layers_to_transform"))
    left_out: dict[str, list[str]] = {}
    for name, stored in names.items():
        if ".experts" in name:
            continue
        all_names = (*spellings(name), stored, to_tinker_name(name))
        if not targeted(all_names):
            left_out.setdefault("target_modules", []).append(name)
        elif excluded(all_names):
            left_out.setdefault("exclude_modules", []).append(name)
        elif layers and layer_of(name) not in layers:
            left_out.setdefault("layers_to_transform", []).append(name)
    for field, modules in left_out.items():
        message = (
            f"adapter_config {field} leaves out {summarise(modules)}, whose factors are there: "
            "PEFT would not apply them: change it where they were trained, or take their tensors "
            "out of the file"
        )
        if on_problem is None:
            raise ValueError(message)
        on_problem(message)


def _layers(value: object) -> list[object]:
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _targets(config: Mapping[str, Any]) -> _Selects:
    modules, parameters = config.get("target_modules"), config.get("target_parameters")
    if modules == "all-linear" or not (modules or parameters):
        return lambda _names: True
    of_modules = _selector(modules, unknown=True)
    of_parameters = _selector(parameters, unknown=True)
    return lambda names: (
        of_modules(names) or of_parameters([*names, *(f"{name}.weight" for name in names)])
    )


def _selector(targets: object, *, unknown: bool) -> _Selects:
    """Return what selects by a list of names' ends, or by a pattern of whole names.

    unknown: what it says where the pattern is none that can be matched.
    """
    if isinstance(targets, str) and targets:
        return _pattern(targets, unknown=unknown)
    listed = targets if isinstance(targets, list) else []
    ends = {without_wrappers(end) for end in listed if isinstance(end, str)}
    return lambda names: any(end in ends for name in names for end in _ends(name))


def _ends(name: str) -> Iterable[str]:
    return (name, *(name[dot.end() :] for dot in re.finditer(r"\.", name)))


def _pattern(text: str, *, unknown: bool) -> _Selects:
    options = re2.Options()
    options.log_errors = False
    try:
        found = re2.compile(text, options) if len(text) <= _MAX_PATTERN else None
    except re2.error:
        found = None
    if found is None:
        return lambda _names: unknown
    return lambda names: any(found.fullmatch(name) is not None for name in names)
