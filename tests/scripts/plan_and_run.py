"""Plan runs as this rank, then run a step of each with all other ranks; write what both hold.

    plan_and_run.py CASES.json OUT

Both read it by the same code off their tensors, which are on meta in a plan, and on the CPU and
among real peers in a run. What a run holds is also added up without that code.
"""

import contextlib
import functools
import io
import json
import os
import pickle
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import num_microbatches_calculator, parallel_state, rerun_state_machine
from megatron.training import global_vars, training
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalora.adapters import gated
from megalora.plan import gpu, step, world
from megalora.plan.memory import memory
from megalora.plan.meter import META, Meter
from megalora.plan.processes import OWN_SCRIPT
from megalora.plan.ranks import positions
from megalora.plan.script import Built, build
from megalora.run import Launcher, execute
from megalora.training import patches


class Done(BaseException):
    """Ends a script once its step has run."""


def _none(*_: object) -> bool:
    """Leave gated MLPs to Megatron; a mock would keep what it is given."""
    return False


def read(built: Built, device: torch.device) -> dict[str, Any]:
    """Run a step and return what this rank holds."""
    meter = Meter(device)
    # What the CPU has of its own, torch's attention and our gated MLPs, holds less than a plan has.
    with (
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.object(gated, "takes_weights", _none),
    ):
        done = step.run_step(built.model, built.optimizer, built.args, meter)
    named = [pair for chunk in built.model for pair in chunk.named_parameters()]
    return {
        "shapes": [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in named],
        "memory": asdict(memory(built, done)),
        "position": asdict(positions(built.args)[built.args.rank]),
    }


def added_up(built: Built) -> dict[str, int]:
    """Add up what a real run holds, parameter by parameter and state by state."""
    parameters = [p for chunk in built.model for p in chunk.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    weights = {p.untyped_storage().data_ptr() for p in parameters}
    optimizer: Any = built.optimizer
    updated = [
        (own, one.optimizer.state[own])
        for one in getattr(optimizer, "chained_optimizers", [optimizer])
        for group in one.optimizer.param_groups
        for own in group["params"]
    ]
    copies = [own for own, _ in updated if own.untyped_storage().data_ptr() not in weights]
    states = [state for _, kept in updated for state in kept.values() if state.dim()]
    chunks: Any = built.model
    buffers = [b for chunk in chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    nobodys = [(b, b.numel - sum(p.numel() for p in b.params)) for b in buffers]
    gradients: list[Any] = [p.main_grad for p in trained]  # type: ignore[attr-defined]
    return {
        "frozen": sum(p.numel() for p in parameters if not p.requires_grad),
        "trained": sum(p.numel() for p in trained),
        "weights": size(parameters)
        + sum(n * b.param_dtype.itemsize for b, n in nobodys if b.param_data is not None),
        "gradients": size(gradients) + sum(n * b.grad_dtype.itemsize for b, n in nobodys),
        "optimizer": size([*copies, *states]),
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "dense": parallel_state.get_data_parallel_rank(with_context_parallel=True),
        "expert": parallel_state.get_expert_data_parallel_rank(),
    }


def size(tensors: list[Any]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def plan(rank: int, world_size: int, argv: list[str]) -> dict[str, Any]:
    """Plan in this process, which is of no use for anything else afterwards."""
    world.install()
    world.become(rank, world_size)
    # What a GPU's kernels hold in place of this machine's is for other tests.
    with mock.patch.object(gpu, "kernels", contextlib.nullcontext):
        return build(OWN_SCRIPT, argv, functools.partial(read, device=META))


def run(argv: list[str]) -> dict[str, Any]:
    """Run a step with the other ranks; Megatron then forgets what it knew of this run."""
    found: list[dict[str, Any]] = []

    def set_up(original: Callable[..., Any], *args: object, **kwargs: object) -> None:
        model, optimizer, _ = original(*args, **kwargs)
        known: Any = global_vars.get_args()
        built = Built(known, model, optimizer)
        found.append({**read(built, torch.device("cpu")), "added_up": added_up(built)})
        raise Done

    sys.argv = [str(OWN_SCRIPT), *argv]
    hooked = functools.partial(set_up, training.setup_model_and_optimizer)
    with (
        mock.patch.object(training, "setup_model_and_optimizer", hooked),
        mock.patch.object(step, "assumptions", contextlib.nullcontext),
        contextlib.suppress(Done),
    ):
        execute(OWN_SCRIPT)
    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    rerun_state_machine.destroy_rerun_state_machine()
    global_vars.destroy_global_vars()
    return found[0]


def forked(function: Callable[..., Any], *args: object) -> Any:
    """Return what a function returns in a copy of this process, of which there are no threads."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            with open(writer, "wb") as out:
                pickle.dump(function(*args), out)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as given:
        data = given.read()
    os.waitpid(child, 0)
    return pickle.loads(data)


def main() -> None:
    """Plan and run all cases."""
    cases: dict[str, list[str]] = json.loads(Path(sys.argv[1]).read_text())
    out = Path(sys.argv[2]) / f"{os.environ['RANK']}.pickle"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    sys.modules["__main__"] = types.ModuleType("__main__")
    with contextlib.redirect_stdout(io.StringIO()):
        planned = {name: forked(plan, rank, world_size, argv) for name, argv in cases.items()}
        patches.install(patches.PARSING)
        Launcher().install()
        ran = {name: run(argv) for name, argv in cases.items()}
    out.write_bytes(pickle.dumps({"planned": planned, "ran": ran}))


if __name__ == "__main__":
    main()
