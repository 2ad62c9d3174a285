"""torch's attention for the local layers: MLA, context parallelism and packed sequences too."""

import contextlib
import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)
from torch.nn.functional import pad, scaled_dot_product_attention

from megalora.replace import Patch, instead

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
# torch's padding of [s, b, heads, d], and of a mask [..., queries, keys].
_ONE_BEFORE_AND_ONE_FEATURE = (0, 1, 0, 0, 0, 0, 1, 0)
_ONE_BEFORE = (1, 0, 1, 0)


class CoreAttention(MegatronModule):
    """Stand where Megatron's DotProductAttention stands.

    That one takes no multi-latent attention, context parallelism or packed sequences, forgets the
    mask that it is given where it has a window, and holds all scores of a layer in memory.
    softmax_offset: of each head, what it may look at beside the keys; None where it may not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = pg_collection.cp
        self.attn_mask_type = attn_mask_type
        # Megatron takes None here, whatever it says.
        skipped: Any = config.window_attn_skip_freq
        has_window = is_layer_window_attention(config.window_size, skipped, layer_number)
        self.window = config.window_size if has_window else None
        # So that a query may not look at all keys here before it.
        self.is_cut = pg_collection.cp.size() > 1 or self.window is not None
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        k_channels = k_channels or config.kv_channels
        assert k_channels is not None
        self.softmax_scale = softmax_scale or 1 / math.sqrt(k_channels)
        if config.apply_query_key_layer_scaling:
            self.softmax_scale /= max(1, layer_number)
        self.tp_group = pg_collection.tp
        self._make_softmax_offset(config)

    def _make_softmax_offset(self, config: TransformerConfig) -> None:
        """Give each head of this rank its offset: a parameter, 0, or none."""
        self.softmax_offset: torch.Tensor | None
        if config.softmax_type == "vanilla":
            self.softmax_offset = None
            return
        heads = config.num_attention_heads // self.tp_group.size()
        device = torch.cuda.current_device()
        offset = torch.zeros(heads, device=device, dtype=config.params_dtype)
        if config.softmax_type != "learnable":
            self.register_buffer("softmax_offset", offset, persistent=False)
            return
        if config.perform_initialization:
            assert config.init_method is not None
            config.init_method(offset)
        self.register_parameter("softmax_offset", torch.nn.Parameter(offset))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """Return the offsets, which are cut by heads, as Megatron's own attention names them."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"],
        )

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        query: [s/cp, b, heads, d], key and value: [s/cp, b, groups, d], or [t/cp, ., d] if packed.
        attention_mask: [b or 1, 1, s/cp, s], True where a query must not look; None asks for what
        attn_mask_type says. Returns [s/cp, b, heads * d_v], or [t/cp, heads * d_v] if packed.
        """
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed:
            query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        causal = (attn_mask_type or self.attn_mask_type) in _CAUSAL
        allowed: torch.Tensor | None = None
        if packed and causal and attention_bias is None and not self.is_cut:
            # Memory grows with the tokens; a mask of who may look at whom grows with their square.
            sizes = _boundaries(packed_seq_params, query.shape[0]).diff().tolist()
            parts = zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
            out = torch.cat([self._attend(q, k, v, None, True, None) for q, k, v in parts])
            return out.flatten(2).squeeze(1)
        if packed or self.is_cut:
            if not causal:
                raise ValueError(
                    "packed sequences, context parallelism and windows need a causal attention "
                    f"mask in the local layers, got {attn_mask_type or self.attn_mask_type}"
                )
            boundaries = _boundaries(packed_seq_params, query.shape[0] * self.cp_group.size())
            key, value, allowed = self._gather_context(key, value, boundaries)
        if attention_mask is not None and not packed:
            allowed = self._unmasked(attention_mask, allowed)
        out = self._attend(query, key, value, allowed, causal and allowed is None, attention_bias)
        out = out.flatten(2)
        return out.squeeze(1) if packed else out

    def _unmasked(self, attention_mask: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Return what a mask, and the window where there is one, let queries look at."""
        in_window = None if self.window is None else allowed
        return ~attention_mask if in_window is None else ~attention_mask & in_window

    def _gather_context(
        self, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All-gather keys and values over the context-parallel group, in the order of the text.

        Returns them [s, b, groups, d] with what each local query may look at, [s/cp, s].
        """
        cp_size, cp_rank = self.cp_group.size(), self.cp_group.rank()
        positions = [_zigzag(boundaries, cp_size, r).to(key.device) for r in range(cp_size)]
        order = torch.cat(positions).argsort()
        if cp_size > 1:
            # dgrad: reduce-scatter, every rank's queries used every key
            key, value = (
                gather_from_sequence_parallel_region(
                    x, tensor_parallel_output_grad=True, group=self.cp_group
                )[order]
                for x in (key, value)
            )
        queries, keys = positions[cp_rank], torch.arange(order.numel(), device=key.device)
        sequence = torch.bucketize(keys, boundaries[1:-1].to(key.device), right=True)
        allowed = (queries[:, None] >= keys) & (sequence[queries][:, None] == sequence)
        if self.window is not None and self.window[0] >= 0:
            allowed &= queries[:, None] - keys <= self.window[0]
        return key, value, allowed

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        causal: bool,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return [s, b, heads, d_v] from [s, b, heads, d] by torch's fused attention."""
        if self.softmax_offset is None:
            return self._attend_to_keys(query, key, value, allowed, causal, bias)
        # A token before the first, at which all look: its value is 0, and its score the offset
        # alone, by a feature that it and the queries have and the keys have not.
        query, key, value = (pad(x, _ONE_BEFORE_AND_ONE_FEATURE) for x in (query, key, value))
        offset = (self.softmax_offset / self.softmax_scale).to(query.dtype)
        query = query + pad(offset[:, None], (query.shape[-1] - 1, 0))
        key[0, ..., -1] = 1.0
        if allowed is not None:
            allowed = pad(allowed, _ONE_BEFORE, value=True)
        if bias is not None:
            bias = pad(bias, _ONE_BEFORE)
        return self._attend_to_keys(query, key, value, allowed, causal, bias)[1:, ..., :-1]

    def _attend_to_keys(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        causal: bool,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        if bias is not None:
            # torch takes one mask, boolean or additive.
            if causal:
                ones = bias.new_ones(query.shape[0], key.shape[0], dtype=torch.bool)
                allowed = ones.tril()
            allowed = bias if allowed is None else bias.masked_fill(~allowed, float("-inf"))
            causal = False
        dropout = self.dropout if self.training else 0.0
        # As DotProductAttention does: heads are sharded, so each rank draws its own numbers.
        fork = dropout > 0 and not self.config.sequence_parallel
        tracker: Any = get_cuda_rng_tracker()
        with tracker.fork() if fork else contextlib.nullcontext():
            out = scaled_dot_product_attention(
                *(x.permute(1, 2, 0, 3) for x in (query, key, value)),
                attn_mask=allowed,
                dropout_p=dropout,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return out.permute(2, 0, 1, 3)


def core_attention(self: LocalSpecProvider) -> type:
    """Name this attention for all layers of a provider of layers."""
    return CoreAttention


PATCHES = (
    Patch(
        LocalSpecProvider,
        "core_attention",
        ("self",),
        instead(core_attention),
        "Megatron's own attention takes no latent attention, context parallelism or packed "
        "sequences, and no mask beside a window, and holds all scores",
    ),
)


def _boundaries(packed: PackedSeqParams | None, num_tokens: int) -> torch.Tensor:
    """Return where sequences start, and at the end the number of tokens over all ranks, on the CPU.

    Padding after the last sequence counts as one more sequence. Padding within `cu_seqlens_padded`
    ends its sequence, where a causal mask hides it from every real token.
    """
    if packed is None:
        return torch.tensor([0, num_tokens])
    starts = (
        packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    )
    starts = starts.long().cpu()
    if starts[-1] < num_tokens:
        starts = torch.cat([starts, torch.tensor([num_tokens])])
    return starts


def _zigzag(boundaries: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Return the positions that a rank holds: chunks r and 2 cp - 1 - r of each sequence.

    Megatron cuts sequences so to even out the work of a causal mask.
    """
    if cp_size == 1:
        return torch.arange(int(boundaries[-1]))
    positions = []
    for start, end in zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True):
        chunk, rest = divmod(end - start, 2 * cp_size)
        if rest:
            raise ValueError(
                f"a sequence of {end - start} tokens cannot be cut in 2 * context_parallel_size = "
                f"{2 * cp_size} chunks: pad it to a multiple"
            )
        for index in (cp_rank, 2 * cp_size - 1 - cp_rank):
            positions.append(torch.arange(start + index * chunk, start + (index + 1) * chunk))
    return torch.cat(positions)
