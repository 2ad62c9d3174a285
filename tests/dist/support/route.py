"""The arguments of a run that the data route and Megatron's loader look at, without a run."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

from megatron.training.datasets import data_samplers

from megalora.data import batch


def route_args(**own: object) -> SimpleNamespace:
    """Return the arguments of a dense model; `own` has the sizes, and what else differs."""
    usual = {
        "dataloader_type": "single",
        "full_validation": False,
        "hybrid_context_parallel": False,
        "num_workers": 0,
        "exit_signal_handler": False,
        "check_for_nan_in_loss_and_grad": True,
        "calculate_per_token_loss": True,
        "num_experts": None,
        "moe_router_load_balancing_type": "none",
        "sequence_parallel": False,
    }
    return SimpleNamespace(**usual | own)


@contextlib.contextmanager
def as_args(args: SimpleNamespace, attention: str | None = None) -> Iterator[None]:
    """Give them to all who ask Megatron for its arguments, and a form of attention where given."""
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    route = {
        "get_args": lambda: args,
        "get_timers": lambda: lambda name, log_level=0: timer,
        "attention_format": (lambda _: attention) if attention else batch.attention_format,
    }
    with (
        mock.patch.multiple(batch, **route),
        mock.patch.object(data_samplers, "get_args", return_value=args),
    ):
        yield
