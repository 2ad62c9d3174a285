"""A running model's adapters on rank 0, in a server's names, a few layers at a time."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megalora.checkpoint.gather import BUCKET_BYTES, gather_layers, whole_sizes
from megalora.checkpoint.ranks import on_all_ranks
from megalora.config import LoRAConfig
from megalora.hf.exchange import check_export, model_shape, start_values
from megalora.sync.plan import Named, Plan
from megalora.sync.replica import Replica


class RunningAdapters:
    """The adapters of a model in training, in the names and the format that a server reads.

    plan: what the server gets. notes: what it needs to be started with, as sentences. replica:
    which ranks hold the same model, and which of them speaks for it. format: of `hf.peft.FORMATS`.
    """

    def __init__(
        self,
        model_chunks: Sequence[torch.nn.Module],
        config: LoRAConfig,
        *,
        server: str,
        hf_model: str | None = None,
        vocab_size: int | None = None,
        base_model_name: str = "",
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Plan for a server of `megalora.hf.servers.SERVERS`. All ranks must call it.

        hf_model: directory of the base. vocab_size: rows of its vocabulary; None for those that
        `apply_lora` was told. bucket_bytes: of adapters that travel together. Raises ValueError, on
        all ranks, where the server would refuse the adapter, or load it wrongly.
        """
        self._chunks, self._bucket_bytes = model_chunks, bucket_bytes
        shape = model_shape(model_chunks, hf_model)
        shape = replace(shape, vocab_size=vocab_size or shape.vocab_size)
        whole = whole_sizes(model_chunks)
        self.format, self.notes = check_export(
            model_chunks,
            config=config,
            vocab_size=shape.vocab_size,
            hf_model=hf_model,
            server=server,
        )
        self.plan = Plan(whole, config, shape, self.format, base_model_name=base_model_name)
        # The base lost what the adapter started from, so it belongs to the update.
        self._initial = start_values(model_chunks) if config.init == "pissa" else None
        self.replica = replica_of(next(model_chunks[0].parameters()).device)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the whole adapter as it is now, on rank 0; nothing elsewhere.

        Without the base, on the CPU, of `plan.sizes`. All ranks must go through it to its end, with
        what `gather_layers` says of memory and collectives. In the format `uniform` rank 0 holds
        one tensor more, with its zeros; `pissa` keeps the start values of all adapters there.
        """
        yield from self._named(self._pieces())

    def hand_over(self, take: Callable[[Named], None]) -> None:
        """Give rank 0's tensors to a function there. All ranks must call it.

        What fails there ends in one ValueError on all ranks, after all have gone through all
        collectives.
        """
        pieces = self._pieces()

        def work() -> None:
            try:
                if dist.get_rank() == 0:
                    take(self._named(pieces))
            finally:
                deque(pieces, maxlen=0)

        on_all_ranks(work)

    def _pieces(self) -> Iterator[dict[str, Tensor]]:
        for chunk in self._chunks:
            ddp = getattr(chunk, "ddp_config", None)
            if ddp is not None and ddp.overlap_param_gather:
                # What the optimizer made of the parameters is else on its way until a forward.
                chunk.start_param_sync(force_sync=True)  # type: ignore[operator]
        yield from gather_layers(self._chunks, bucket_bytes=self._bucket_bytes)

    def _named(self, pieces: Iterator[dict[str, Tensor]]) -> Named:
        for piece in pieces:
            if piece:
                yield from self.plan.tensors(piece, self._initial)


def replica_of(device: torch.device) -> Replica:
    """Return this rank's place among those that hold the same model; see `Replica`."""
    # First over the context-parallel ranks beside the speaker, then over tensors and stages.
    groups: list[Any] = [parallel_state.get_model_parallel_group()]
    of_first = parallel_state.get_tensor_model_parallel_rank() == 0
    of_first &= parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    if of_first:
        groups.insert(0, parallel_state.get_context_parallel_group())
    return Replica(
        index=parallel_state.get_data_parallel_rank(),
        speaks=of_first and parallel_state.get_context_parallel_rank() == 0,
        groups=groups,
        device=device,
    )
