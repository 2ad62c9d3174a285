"""A parallel layout, and Megatron's process groups for it."""

import contextlib
import dataclasses
from collections.abc import Iterator

import pytest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the parallel dimensions; `vpp` counts virtual stages per pipeline rank.

    `etp` is the tensor-parallel size of experts. Expert data parallelism takes what is left of
    world_size / (pp * ep * etp).
    """

    tp: int = 1
    sp: bool = False
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int = 1
    cp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """The number of processes that the layout needs."""
        return self.tp * self.pp * self.cp * self.dp

    def __str__(self) -> str:
        """Name the dimensions in use, such as `tp2-sp-ep2`, or `single`."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value not in (None, False, 1) or value is True:
                parts.append(field.name if value is True else f"{field.name}{value}")
        return "-".join(parts) or "single"


def world(layout: Layout) -> pytest.MarkDecorator:
    """Return the mark of the world that a layout needs."""
    return getattr(pytest.mark, f"world_{layout.world_size}")


def over(*layouts: Layout) -> pytest.MarkDecorator:
    """Run a test that takes `layout` over these layouts, each in the world that it needs."""
    return pytest.mark.parametrize(
        "layout",
        [pytest.param(layout, id=str(layout), marks=world(layout)) for layout in layouts],
    )


def one_rank(layout: Layout) -> Layout:
    """Return the unsharded layout that runs in the processes of `layout`.

    A test that gives all its data-parallel ranks the same batch computes what one rank would.
    """
    return Layout(dp=layout.world_size)


@contextlib.contextmanager
def model_parallel(layout: Layout) -> Iterator[None]:
    """Set Megatron's process groups and random numbers up for `layout`, then take them down."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    assert dist.get_world_size() == layout.world_size, (
        f"{layout} needs {layout.world_size} processes, this run has {dist.get_world_size()}"
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        # What is to be logged has a place for each layer and depth of this model.
        MTPLossLoggingHelper.tracker.clear()
        destroy_moe_metrics_tracker()
