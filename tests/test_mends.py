"""What `megalora.mends` leaves to Megatron, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.forked import call


def replaces_make(folder: Path) -> bool:
    """Say whether `make` is skipped where Megatron's datasets are in this folder."""
    from megatron.core.datasets import utils

    from megalora.mends import dataset_helpers

    utils.__file__ = str(folder / "utils.py")
    return [patch.name for patch in dataset_helpers.patches()] == ["compile_helpers"]


def test_make_runs_where_there_is_a_makefile(tmp_path: Path) -> None:
    assert call(replaces_make, tmp_path)
    (tmp_path / "Makefile").touch()
    assert not call(replaces_make, tmp_path)


def attention_of(fields: dict[str, Any]) -> str:
    """Return the class of the local layers' core attention of such a configuration."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=2, **fields)
    alone: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    attention = LocalSpecProvider().core_attention()(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=SimpleNamespace(tp=alone, cp=alone),
    )
    return type(attention).__name__


def test_softmax_offsets_stay_with_megatron() -> None:
    assert call(attention_of, {}) == "CoreAttention"
    assert call(attention_of, {"window_size": (4, 0)}) == "CoreAttention"
    assert call(attention_of, {"softmax_type": "off-by-one"}) == "DotProductAttention"


def message_of(part: str) -> str:
    """Return why a part is refused."""
    import torch

    from megalora.mends.layers import build_norm
    from megalora.mends.optimizer import FusedAdam

    config = SimpleNamespace(layernorm_zero_centered_gamma=part == "gamma", normalization="L2Norm")
    try:
        if part == "adam":
            FusedAdam([torch.nn.Parameter(torch.zeros(1))], capturable=True)
        build_norm(object, config, 4)
    except ValueError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("gamma", "leave out --apply-layernorm-1p"),
        ("norm", "normalization 'L2Norm' is not in torch: use RMSNorm or LayerNorm"),
        ("adam", "leave out --optimizer-cuda-graph"),
    ],
)
def test_what_torch_lacks_is_refused(part: str, message: str) -> None:
    assert message in call(message_of, part)


def counts_of(padding: list[bool]) -> list[float]:
    """Return a router's tokens of each of 4 experts, for 3 tokens that choose 2 each."""
    import torch
    from megatron.core.transformer.moe.router import TopKRouter

    chosen = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]).bool()
    router = SimpleNamespace(enable_expert_bias=True, local_tokens_per_expert=torch.zeros(4))
    count: Any = TopKRouter._apply_expert_bias
    count(router, chosen, padding_mask=torch.tensor(padding))
    return router.local_tokens_per_expert.tolist()


def test_an_expert_bias_counts_no_padding() -> None:
    assert call(counts_of, [False, False, False]) == [3, 1, 1, 1]
    assert call(counts_of, [False, True, False]) == [2, 1, 0, 1]


def query_projections() -> list[object]:
    from megalora.mends.latent_attention import resolve_local, resolve_plain

    def resolve(_resolver: object) -> dict[str, object]:
        return {"linear_q_proj": "normed"}

    found = []
    for mended in (resolve_local, resolve_plain):
        resolver: Any = SimpleNamespace(
            has_q_lora=False,
            is_dsa=False,
            config=SimpleNamespace(qk_layernorm=True),
            submodules=SimpleNamespace(linear_q_proj="plain"),
            fused_norm_linear_impl="TransformerEngine's",
        )
        found.append(mended(resolve, resolver)["linear_q_proj"])
    return found


def test_queries_without_a_latent_have_no_norm_of_theirs_where_the_model_is_hugging_faces() -> None:
    assert call(query_projections) == ["normed", "plain"]
