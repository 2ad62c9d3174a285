"""Warnings of other packages that say nothing to who starts a run: each is silenced by its name.

Nothing happens on import. `install` is called by what starts a run or a command, never for those
who only import megalora. MEGALORA_WARNINGS=1 in the environment shows all of them again.
"""

import importlib.util
import logging
import os
import re
import warnings
from dataclasses import dataclass

SHOW = "MEGALORA_WARNINGS"


@dataclass(frozen=True, slots=True)
class Noise:
    """One message: by whom, how it begins, and why it can be left out.

    source: the module that warns, or the logger's name. says: a regular expression that the message
    begins with. category: of Python's warnings; None for a logger's.
    """

    source: str
    says: str
    why: str
    category: type[Warning] | None = None


_NO_TE = "what runs without TransformerEngine and apex is said by `megalora:` lines"
_MODEL = "not a choice of the user's: adapters go around GPTModel as around HybridModel"
_RENAMED = "a name that Megatron calls, which works"

NOISE = (
    *(
        Noise(source, says, _NO_TE, UserWarning)
        for source, says in (
            ("megatron.core.optimizer", "Transformer Engine and Apex are not installed"),
            ("megatron.core.optimizer.optimizer", "Transformer Engine and Apex are not installed"),
            ("megatron.core.optimizer.clip_grads", "Transformer Engine and Apex are not installed"),
            (
                "megatron.core.distributed.fsdp.src.megatron_fsdp.mixed_precision",
                "Transformer Engine and Apex are not installed",
            ),
            (
                "megatron.training.utils.common_utils",
                "Transformer Engine and Apex are not installed",
            ),
            ("megatron.core.models.backends", "Apex is not installed"),
            ("megatron.core.models.gpt.gpt_layer_specs", "Apex is not installed"),
            (
                "megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs",
                "Apex is not installed",
            ),
            (
                "megatron.core.extensions.transformer_engine_spec_provider",
                "Only transformer-engine>=1.7.0 supports MoE experts",
            ),
        )
    ),
    Noise(
        "megatron.core._rank_utils",
        "Could not determine rank",
        "a command is one process",
        UserWarning,
    ),
    Noise(
        "megatron.core.models.mimo.config.base_configs",
        "MimoModelConfig is experimental",
        "Megatron imports it, nobody here uses it",
        UserWarning,
    ),
    Noise(
        "megatron.core.tensor_parallel.layers",
        "`sequence_parallel` is set to `True`, but tensor model parallel size is",
        "of experts that are whole on a rank; Megatron's flags say it of a model",
        UserWarning,
    ),
    Noise(
        "torch.distributed.c10d_logger",
        r"`torch\.distributed\.\w+` is deprecated",
        _RENAMED,
        FutureWarning,
    ),
    Noise(
        "torch.distributed.checkpoint.utils",
        "torch.distributed is disabled, unavailable or uninitialized",
        "a command is one process",
        UserWarning,
    ),
    Noise(
        "torch.utils.data.dataloader",
        "'pin_memory' argument is set as true but no accelerator is found",
        "Megatron always asks for it; on the CPU there is nothing to pin",
        UserWarning,
    ),
    Noise(
        "torch.utils.cpp_extension",
        "No CUDA runtime is found",
        "a machine without a GPU is told so by a `megalora:` line",
    ),
    Noise("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED", _MODEL),
    Noise(
        "megatron.core.rerun_state_machine",
        "RerunStateMachine initialized in mode|Result validation enabled|Setting RerunStateMachine",
        "a check's default, off and on again around each evaluation, as a warning",
    ),
    Noise(
        "megatron.core.dist_checkpointing.strategies.torch",
        "MCore's async save is deprecated",
        "its successor copies from a GPU and is chosen by --async-strategy",
    ),
)


class _Dropped(logging.Filter):
    """Drop the records of one logger whose messages begin in known ways."""

    def __init__(self, says: str) -> None:
        super().__init__()
        self.says = re.compile(says)

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record is shown: errors always are."""
        return record.levelno >= logging.ERROR or not self.says.match(record.getMessage())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Dropped) and other.says == self.says

    __hash__ = logging.Filter.__hash__


def install() -> None:
    """Silence `NOISE` in this process, but where the environment asks for it."""
    if shown():
        return
    for noise in NOISE:
        if noise.category is None:
            logging.getLogger(noise.source).addFilter(_Dropped(noise.says))
        else:
            warnings.filterwarnings(
                "ignore", noise.says, noise.category, rf"{re.escape(noise.source)}$"
            )


def shown() -> bool:
    """Say whether the environment asks for all warnings."""
    return os.environ.get(SHOW, "") not in ("", "0")


def has_one_logger() -> bool:
    """Say whether NVIDIA's own one_logger is there, whose absence Megatron prints a link about."""
    return shown() or importlib.util.find_spec("one_logger") is not None
