"""All that training replaces in Megatron: the table, and the functions that are no one else's.

It comes in phases: what follows parsing is guarded before a script parses (`PARSING`), what saves
and learns is replaced once a run has adapters (`TRAINING`). docs/patches.md lists these and those
of `megalora.mends`, `megalora.cpu` and `megalora.run`.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller
from megatron.core.optimizer import (
    ChainedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    distrib_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import unwrap_model
from megatron.training import (
    arguments,
    checkpointing,
    get_args,
    global_vars,
    print_rank_0,
    training,
)

from megalora import replace
from megalora.checkpoint import optimizer_state, schedule, writers
from megalora.checkpoint.find import check_flags, find_checkpoint
from megalora.checkpoint.loading import LOADING
from megalora.checkpoint.save import Saver
from megalora.config import LoRAConfig
from megalora.replace import Patch, around, instead
from megalora.training import changes, compared, inside, not_finite, parsing, trust
from megalora.training.needed import check_rate
from megalora.training.rates import factor_overrides


def load_args(
    original: Callable[..., object],
    args: argparse.Namespace,
    load_arg: str = "load",
    *more: object,
    **kwargs: object,
) -> object:
    """Let --use-checkpoint-args read its flags from the checkpoint that the run will go on from.

    Megatron reads them before any process group exists: each rank by itself checks the files that
    have them, and finds the same; the tracker file then names it. All files are checked later.
    """
    if not getattr(args, "lora_rank", 0):
        return original(args, load_arg, *more, **kwargs)
    trust.check_trust(args)
    install(LOADING)
    if load_arg == "load" and args.load:
        options = {"step": args.ckpt_step, "on_corrupt": args.lora_on_corrupt, "warn": _say_once}
        find_checkpoint(args.load, **options, sums=check_flags)
    given = args.spec
    found = original(args, load_arg, *more, **kwargs)
    trust.check_spec(args.spec, given)
    return found


def _say_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def build_data_iterators(
    original: Callable[[object], tuple[object, ...]],
    build_train_valid_test_datasets_provider: object,
) -> tuple[object, ...]:
    """Let a run that starts again after its last iteration end well, and write its exports.

    Megatron's samplers would raise AssertionError, as no sample is left.
    """
    args = cast(argparse.Namespace, get_args())
    done = changes.when_done(args)
    if not done:
        return original(build_train_valid_test_datasets_provider)
    print_rank_0(f"> LoRA: iteration {args.iteration} was the last: nothing is left to train")
    changes.change_args(args, done)
    return None, None, None


def build_optimizer(
    original: Callable[..., MegatronOptimizer],
    config: OptimizerConfig,
    model_chunks: Sequence[torch.nn.Module],
    config_overrides: Mapping[ParamKey, ParamGroupOverride] | None = None,
    **kwargs: object,
) -> MegatronOptimizer:
    """Give A and B their own learning rate and Adam epsilon; know what is watched from now on."""
    lora = _lora_config(model_chunks)
    if lora is not None:
        check_rate(config.lr)
        not_finite.WATCH.model_chunks = unwrap_model(list(model_chunks))
        if config_overrides is None:
            config_overrides = get_standard_config_overrides(config)
        config_overrides = {**config_overrides, **factor_overrides(lora, cast(Any, config))}
    optimizer = original(config, model_chunks, config_overrides=config_overrides, **kwargs)
    if lora is not None:
        inside.INSIDE.watch(inside.Run(model_chunks, optimizer, config, lora))
    return optimizer


def _lora_config(model_chunks: Sequence[torch.nn.Module]) -> LoRAConfig | None:
    """Return the configuration of a model's adapters, which every chunk has, also without one."""
    (chunk, *_) = unwrap_model(list(model_chunks))
    description = getattr(chunk, "megalora_description", None)
    return None if description is None else LoRAConfig.from_dict(description["config"])


_PLAIN = (FP32Optimizer, Float16OptimizerWithFloat16Params)
_SAVER = Saver()

PARSING = (
    *compared.PARSING,
    Patch(
        arguments,
        "add_megatron_arguments",
        ("parser",),
        around(parsing.add_arguments),
        "`--lr auto` in every parse; a wrong flag is a page of usage on each rank",
    ),
    Patch(
        checkpointing,
        "load_args_from_checkpoint",
        ("args", "load_arg"),
        around(load_args),
        "`--use-checkpoint-args` reads a damaged checkpoint, and imports what one names",
    ),
    Patch(
        arguments,
        "validate_args",
        ("args",),
        around(parsing.validate_args),
        "flags that are missing or do not fit are bare assertions, as `--save` without "
        "`--save-interval`",
    ),
    Patch(
        global_vars,
        "build_tokenizer",
        ("args",),
        around(trust.build_tokenizer),
        "a missing `--tokenizer-type` ends in a list of kinds; tokenizers bring Python",
    ),
)

# Started before there is a model: `megalora run` replaces them before its script runs.
WRITERS = (
    Patch(
        filesystem_async,
        "get_write_results_queue",
        ("mp_mode",),
        instead(writers.results_queue),
        "the process that holds results ends at SIGTERM, before the last save",
    ),
    Patch(
        PersistentAsyncCaller,
        "async_loop",
        ("rank",),
        writers.outliving,
        "the asynchronous writer ends at SIGTERM, and outlives a rank that is killed",
    ),
    Patch(
        PersistentAsyncCaller,
        "_get_process",
        ("rank", "mp_mode"),
        around(writers.start_writer),
        "multiprocessing waits at exit for a writer that ignores SIGTERM",
    ),
)

TRAINING = (
    *WRITERS,
    *LOADING,
    *not_finite.PATCHES,
    *inside.PATCHES,
    *compared.TRAINING,
    Patch(
        training,
        "save_checkpoint",
        ("iteration", "model", "optimizer", "non_persistent_ckpt"),
        around(_SAVER.save),
        "checksums; stale files of a killed save are mixed in; failures say what is left",
    ),
    Patch(
        training,
        "maybe_finalize_async_save",
        ("blocking", "terminate"),
        around(_SAVER.finish),
        "waits for ever for a writer that died",
    ),
    *(
        Patch(
            optimizer,
            "sharded_state_dict",
            ("model_sharded_state_dict", "is_loading"),
            around(optimizer_state.sharded_state_dict),
            "groups must be as many as the checkpoint's; empty lists do not load",
        )
        for optimizer in _PLAIN
    ),
    *(
        Patch(
            optimizer,
            "_filter_and_reorder_param_groups",
            ("current_groups", "state_dict_groups"),
            instead(optimizer_state.in_order),
            "groups are found by their rates, which a resumed run may change",
        )
        for optimizer in _PLAIN
    ),
    *(
        Patch(
            optimizer,
            "load_state_dict",
            ("state_dict",),
            around(optimizer_state.load),
            "rates and epsilons are this run's, moments and steps the checkpoint's",
        )
        for optimizer in (*_PLAIN, distrib_optimizer.DistributedOptimizer)
    ),
    Patch(
        ChainedOptimizer,
        "__init__",
        ("chained_optimizers",),
        around(optimizer_state.chain),
        "a part without any parameters in the whole model cannot be saved",
    ),
    Patch(
        distrib_optimizer,
        "param_group_identifier_keys",
        None,
        optimizer_state.with_eps,
        "groups that differ in epsilon alone are taken for each other",
    ),
    Patch(
        OptimizerParamScheduler,
        "load_state_dict",
        (),
        around(schedule.load),
        "every number of a resumed schedule would have to be the checkpoint's",
    ),
    Patch(
        training,
        "build_train_valid_test_data_iterators",
        ("build_train_valid_test_datasets_provider",),
        around(build_data_iterators),
        "a run that starts again after its end has no samples: AssertionError",
    ),
    Patch(
        training,
        "get_megatron_optimizer",
        ("config", "model_chunks", "config_overrides"),
        around(build_optimizer),
        "`--lora-lr-ratio`, `--lora-eps-a`, `--lora-eps-b` and `--decoupled-lr`",
    ),
)


def install(patches: Sequence[Patch]) -> None:
    """Replace what a phase lists, once; RuntimeError where Megatron is not as it expects."""
    # Not replaced, but relied on.
    replace.expect(dist_checkpointing, "save", ("verify_integrity",))
    replace.expect(filesystem_async, "_results_queue", None)
    replace.install(patches)
