"""Run a launch script as far as its model and optimizer, on shapes alone, as one rank of many.

The script's own Megatron parses and checks its flags; where it would train, the plan takes over.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.training import get_args, initialize, training

from megalora.cpu import cuda_facade
from megalora.launch import with_hf_flags
from megalora.plan import flags, gpu
from megalora.replace import Patch, around, install
from megalora.run import Launcher, execute
from megalora.training import patches, session


@dataclass(frozen=True, slots=True)
class Built:
    """What a script has built on one rank: parsed flags, model chunks, optimizer; on meta."""

    args: argparse.Namespace
    model: list[torch.nn.Module]
    optimizer: MegatronOptimizer


class Stop(BaseException):
    """Ends a script where its model is built; no Exception, which a script might catch."""


def build[T](script: Path, argv: Sequence[str], use: Callable[[Built], T]) -> T:
    """Run a script until its model and optimizer are built, and return use(them).

    The world must be there (`megalora.plan.world`). Raises what Megatron and megalora find wrong,
    and ValueError where the script ends without a model.
    """
    results: list[T] = []

    def set_up(
        original: Callable[..., tuple[Any, Any, Any]], *given: object, **named: object
    ) -> None:
        with cuda_facade.on_meta(), gpu.kernels():
            model, optimizer, _ = original(*given, **named)
            args = cast(argparse.Namespace, get_args())
            results.append(use(Built(args, model, optimizer)))
        raise Stop

    sys.argv = [str(script), *with_hf_flags(argv)]
    patches.install(patches.PARSING)
    Launcher().install()
    needs, why = ("model_provider_func", "cfg_container"), "a plan ends where training starts"
    end = Patch(training, "setup_model_and_optimizer", needs, around(set_up), why)
    install([*_NUMBERS, *flags.PATCHES, end])
    try:
        execute(script)
    except Stop:
        return results[0]
    raise ValueError(
        f"script {str(script)!r} built no model through megatron.training.pretrain: give the "
        "script that trains"
    )


def _no_base(original: object, *args: object, **kwargs: object) -> dict[str, object]:
    return {"source": None}


def nothing(original: object, *args: object, **kwargs: object) -> None:
    """Stand in the place of what a plan leaves alone."""


# What a run does with a base's numbers and with files, which a plan leaves alone.
_NUMBERS = (
    Patch(session, "load_own_base", ("model_chunks", "args"), around(_no_base), "shapes alone"),
    Patch(session, "check_replicas", ("model_chunks",), around(nothing), "shapes alone"),
    Patch(session, "check_sources", ("args",), around(nothing), "one process"),
    Patch(initialize, "_warmup_jit_function", (), around(nothing), "nothing is compiled"),
)
