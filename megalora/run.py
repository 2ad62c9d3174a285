"""Run an unmodified Megatron launch script with LoRA: `megalora run SCRIPT.py <its flags>`.

Two functions of megatron.training are replaced, each found by its name in its module, which is how
Megatron itself calls it: flags are added where it builds its parser, the hook that attaches
adapters is added where it builds the model. Without --lora-rank the script does what it does
without megalora.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, cast

import torch

from megalora.arguments import add_lora_args
from megalora.launch import (
    LoRARun,
    add_exchange_args,
    at_end,
    check_training_args,
    clear_errors,
    prepare_megatron,
    with_hf_flags,
)
from megalora.replace import KNOWN, Patch, around
from megalora.training.needed import check_started

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.training.config import PretrainConfigContainer

Provider = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
Built = tuple[list[torch.nn.Module], "MegatronOptimizer | None", "OptimizerParamScheduler | None"]


def run_script(script: str, argv: Sequence[str]) -> None:
    """Run a launch script as `python SCRIPT ARGV` does, with LoRA installed in Megatron.

    Raises ValueError where the script does not exist, or has --lora-rank and trains nothing.
    """
    path = script_path(script)
    sys.path.insert(0, str(path.parent))
    prepare_megatron(argv)
    with clear_errors():
        sys.argv = [script, *with_hf_flags(argv)]
        launcher = Launcher()
        launcher.install()
        with at_end(launcher.finish):
            execute(path)


def script_path(script: str) -> Path:
    """Return where a launch script is; ValueError where it is no file."""
    path = Path(script).resolve()
    if not path.is_file():
        problem = "is no file" if path.exists() else "does not exist"
        raise ValueError(f"script {script!r} {problem}: give the path of a launch script")
    return path


def execute(path: Path) -> None:
    """Run a script in `__main__`."""
    # NOTE: not runpy: Megatron's checkpoint writers are spawned and import __main__ again by its
    # spec, which must be our light module and not the script.
    namespace = sys.modules["__main__"].__dict__
    namespace["__file__"] = str(path)
    namespace["__spec__"] = importlib.util.find_spec("megalora.__main__")
    exec(_compiled(path), namespace)


def _compiled(path: Path) -> CodeType:
    """Return a script's code; ValueError where it is no Python, and not called so either."""
    try:
        return compile(path.read_bytes(), str(path), "exec")
    except (SyntaxError, ValueError) as error:
        if path.suffix == ".py":
            raise
        raise ValueError(
            f"script {str(path)!r} is no Python: give a launch script such as pretrain_gpt.py"
        ) from error


def add_flags(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of a run to Megatron's and a script's, but for those that the script has."""
    known = parser._option_string_actions
    if "--lora-rank" not in known:
        add_lora_args(parser)
    if "--hf-model" not in known:
        add_exchange_args(parser)
    if "--cpu" not in known:
        parser.add_argument("--cpu", action="store_true", help="run on the CPU over gloo")
    return parser


class Launcher:
    """Give whatever script runs in this process the flags and hooks of LoRA."""

    def __init__(self) -> None:
        self.run: LoRARun | None = None
        self._is_scripts_own = False

    def install(self) -> None:
        """Replace Megatron's parser and model building; RuntimeError for an unknown Megatron."""
        from megalora.training import patches

        if _wants_lora():
            # Before Megatron starts the process that writes asynchronously.
            patches.install(patches.WRITERS)
        patches.install(self.patches())

    def patches(self) -> tuple[Patch, ...]:
        """Return the table of what is replaced for a script that knows nothing of LoRA."""
        from megatron.training import arguments, training

        return (
            Patch(
                arguments,
                "parse_args",
                ("extra_args_provider",),
                around(self._parse),
                "the flags of LoRA",
            ),
            Patch(
                training,
                "setup_model_and_optimizer",
                ("model_provider_func", "cfg_container"),
                around(self._setup),
                "the adapters of a script's model",
            ),
        )

    def finish(self, *, early: bool = False) -> None:
        """Write what was asked for after training; ValueError where nothing was trained.

        early: the script left by sys.exit(0), as it does for --help.
        """
        if self.run is not None:
            self.run.finish(early=early)
        elif _wants_lora() and not early and not self._is_scripts_own:
            raise ValueError(
                "lora_rank is set, but the script built no model through megatron.training.pretrain"
            )

    def _parse(
        self,
        original: Callable[..., argparse.Namespace],
        extra_args_provider: Provider | None = None,
        *args: object,
        **kwargs: object,
    ) -> argparse.Namespace:
        def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
            return add_flags(extra_args_provider(parser) if extra_args_provider else parser)

        parsed = original(provide, *args, **kwargs)
        check_started()
        return parsed

    def _setup(
        self,
        original: Callable[..., Built],
        model_type: object,
        model_provider_func: Callable[..., torch.nn.Module] | None = None,
        *args: object,
        cfg_container: "PretrainConfigContainer | None" = None,
        **kwargs: object,
    ) -> Built:
        args_of_run = _get_args()
        check_training_args(args_of_run)
        config = getattr(cfg_container, "model", None)
        self._is_scripts_own = any(map(_is_of_a_run, getattr(config, "pre_wrap_hooks", ())))
        if self._is_scripts_own:
            # It has a LoRARun, and finishes it.
            return original(
                model_type, model_provider_func, *args, cfg_container=cfg_container, **kwargs
            )
        self.run = LoRARun(args_of_run)
        if config is not None:
            if not hasattr(config, "pre_wrap_hooks"):
                raise RuntimeError(
                    f"{type(config).__name__} has no pre_wrap_hooks, which megatron-core "
                    f"{' and '.join(KNOWN)} have: attach adapters by megalora.lora_hook instead"
                )
            config.pre_wrap_hooks += self.run.hooks()
        elif model_provider_func is not None:
            model_provider_func = ProviderHook(model_provider_func, self.run)
        built = original(
            model_type, model_provider_func, *args, cfg_container=cfg_container, **kwargs
        )
        if self.run.config is not None and not self.run.model:
            raise ValueError(
                "lora_rank is set, but this script's model was built without its pre_wrap_hooks: "
                "attach adapters by megalora.apply_lora where it is built"
            )
        return built


class ProviderHook:
    """Call a script's model_provider, and prepare the model once its last chunk is built."""

    def __init__(self, provider: Callable[..., torch.nn.Module], run: LoRARun) -> None:
        self.provider, self.run = provider, run
        self.chunks: list[torch.nn.Module] = []

    def __call__(self, *args: object, **kwargs: object) -> torch.nn.Module:
        """Return one model chunk."""
        num_chunks = _get_args().virtual_pipeline_model_parallel_size or 1
        self.chunks.append(self.provider(*args, **kwargs))
        if len(self.chunks) == num_chunks:
            for chunk in self.chunks:
                _set_default_attributes(chunk)
            self.run.prepare(self.chunks)
        return self.chunks[-1]


def _is_of_a_run(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), LoRARun)


def _wants_lora() -> bool:
    return any(arg.split("=")[0] == "--lora-rank" for arg in sys.argv)


def _get_args() -> argparse.Namespace:
    from megatron.training import get_args

    return cast(argparse.Namespace, get_args())


def _set_default_attributes(chunk: torch.nn.Module) -> None:
    # get_model does so only after the provider, and the base's checkpoint entries read them.
    from megatron.core.tensor_parallel import (
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )

    for parameter in chunk.parameters():
        set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
