"""Say which adapters are not finite, where Megatron finds a loss or a gradient that is not.

Nothing is looked at until then: with --no-check-for-nan-in-loss-and-grad, never.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from megatron.core.rerun_state_machine import RerunStateMachine
from torch import Tensor

from megalora.adapters.finite import all_finite
from megalora.model.hybrid import gpt_name, pattern_in
from megalora.replace import Patch, around
from megalora.targets import global_name, is_adapter_key

# What to do, by what is not finite; the first that holds is the cause.
_REMEDIES = {
    "adapter": "training diverged before: go on from an earlier checkpoint, at a lower --lr",
    "base weight": "this rank's base is damaged: start again, on another node if it comes back",
    "gradient": "another rank may name its cause; else start again, and if it comes back, look at "
    "this step's data or lower --lr",
}
_ALL_FINITE = (
    "the adapters, their gradients and the base of this rank are finite: activations overflowed, "
    "or it comes from another rank"
)


class Watch:
    """Go along with Megatron's validation of losses and gradients, and name what is not finite.

    model_chunks: those that are trained, unwrapped.
    """

    def __init__(self) -> None:
        self.model_chunks: Sequence[torch.nn.Module] = ()
        self._said: set[str] = set()

    def validate_result(
        self,
        original: Callable[..., None],
        machine: RerunStateMachine,
        result: object,
        rejection_func: Callable[[object], bool],
        message: str,
        *args: object,
        **kwargs: object,
    ) -> None:
        """Validate as Megatron does, and print what this rank knows of a rejected result."""

        def rejects(value: object) -> bool:
            rejected = rejection_func(value)
            if rejected:
                self._say(value, message, machine.current_iteration)
            return rejected

        if not machine.first_iteration_complete:
            # Megatron lets the first iteration pass, whatever it gives, and steps: from then on
            # all adapters are NaN, and nobody knows which was the first.
            self._say(result, message, machine.current_iteration)
        original(machine, result, rejects, message, *args, **kwargs)

    def _say(self, result: object, message: str, iteration: int) -> None:
        if _is_finite(result) or not self.model_chunks:
            return
        # The log's number; Megatron's own message is one ahead.
        found = (
            f"on rank {dist.get_rank()} in iteration {iteration}, {_describe(self.model_chunks)}"
        )
        if found not in self._said:
            self._said.add(found)
            print(f"error: {message}: {found}", flush=True)


def _is_finite(value: object) -> bool:
    if isinstance(value, Tensor):
        return all_finite(value)
    return not isinstance(value, float) or math.isfinite(value)


def _describe(model_chunks: Sequence[torch.nn.Module]) -> str:
    """Return what is not finite in a model on this rank, and what to do."""
    found: dict[str, list[str]] = {what: [] for what in _REMEDIES}
    for what, name, tensor in _tensors(model_chunks):
        if not all_finite(tensor):
            bad = int((~torch.isfinite(tensor.float())).sum())
            found[what].append(f"{name} ({bad:,} of {tensor.numel():,})")
    parts = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if names[3:] else ''}"
        for what, names in found.items()
        if names
    ]
    if not parts:
        return _ALL_FINITE
    cause = next(what for what, names in found.items() if names)
    return f"NaN or infinite values are in {'; '.join(parts)}: {_REMEDIES[cause]}"


def _tensors(model_chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what it is, its global name and its values, of each parameter and gradient."""
    for chunk in model_chunks:
        numbers = {
            name: cast(int, module.layer_number)
            for name, module in chunk.named_modules()
            if name.startswith("decoder.")
            and isinstance(getattr(module, "layer_number", None), int)
        }
        for local, param in chunk.named_parameters():
            name = gpt_name(global_name(local, numbers), pattern_in(chunk))
            if not is_adapter_key(name):
                yield "base weight", name, param.detach()
                continue
            yield "adapter", name, param.detach()
            grad = getattr(param, "main_grad", param.grad)
            if grad is not None:
                yield "gradient", name, grad


WATCH = Watch()
PATCHES = (
    Patch(
        RerunStateMachine,
        "validate_result",
        ("result", "rejection_func", "message"),
        around(WATCH.validate_result),
        "a loss or a gradient that is not finite is traced to a bucket, not to an adapter",
    ),
)
