"""What a server does with an adapter."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megalora.hf.peft import Format
from megalora.hf.servers.outline import Outline
from megalora.model.served import ServedModel

LEAVE_OUT_UNEMBEDDING = (
    "train with --lora-targets attn mlp, or merge the adapter into its base (megalora merge)"
)


@dataclass(slots=True)
class Verdict:
    """problems: what it refuses, or would load wrongly; warnings; flags: what it is started with.

    Each sentence of problems says what to do.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        """Say whether it serves what was trained."""
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Who reads adapters.

    title: with the version whose source was read, on `seen`. formats: of
    `megalora.hf.peft.FORMATS`, those that it may be given. choose: the one of them for a model,
    by whether all experts share their outer factors. judge: what it does with an adapter.
    """

    title: str
    seen: str
    formats: Sequence[Format]
    choose: Callable[[ServedModel, bool], Format]
    judge: Callable[[Outline, ServedModel], Verdict]


def used_fields(config: Mapping[str, Any], unused: Mapping[str, object]) -> list[str]:
    """Return the fields that are there with another value than the one that means "not used"."""
    return [name for name, value in unused.items() if config.get(name) not in (value, None, [], {})]


def without_unembedding(names: Sequence[str], who: str) -> str:
    """Say that a server takes no adapters of these, and what to do."""
    return f"{who} takes no adapter of {', '.join(names)}: {LEAVE_OUT_UNEMBEDDING}"


def convert(format: str) -> str:
    """Say how the adapter gets another format."""
    return (
        f"export it as {format} (megalora export --format {format}; one that others trained after "
        "megalora import)"
    )
