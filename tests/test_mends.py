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


def differences(softmax_type: str, layer: int) -> list[float]:
    """Return how far our attention of the local layers is from Megatron's: output and gradients.

    Of a layer with a window (1) and one without (2).
    """
    import torch
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    parallel_state._set_global_memory_buffer()
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    alone: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    sizes = {"num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 16}
    window = {"window_size": (3, 0), "window_attn_skip_freq": 2}
    own = {"softmax_type": softmax_type, "init_method": torch.nn.init.normal_}
    fields: Any = {**sizes, **window, **own, "attention_dropout": 0.0}
    config = TransformerConfig(num_layers=2, hidden_size=32, **fields)
    # The last is of the output's gradient.
    sources = [torch.randn(9, 2, *size) for size in ((4, 16), (2, 16), (2, 16), (64,))]
    mask = torch.ones(9, 9, dtype=torch.bool).triu(1)[None, None]
    found = []
    for kind in (LocalSpecProvider().core_attention(), DotProductAttention):
        torch.manual_seed(1)
        groups: Any = SimpleNamespace(tp=alone, cp=alone)
        built: Any = kind(config, layer, AttnMaskType.causal, "self", pg_collection=groups)
        inputs = [source.clone().requires_grad_() for source in sources[:3]]
        output = built(*inputs, mask)
        output.backward(sources[3])
        offsets = built.parameters()
        found.append([output, *(x.grad for x in (*inputs, *offsets))])
    return [float((x - y).abs().max()) for x, y in zip(*found, strict=True)]


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(("softmax_type", "tensors"), [("learnable", 5), ("off-by-one", 4)])
def test_softmax_offsets_are_those_of_megatron(softmax_type: str, tensors: int, layer: int) -> None:
    found = call(differences, softmax_type, layer)
    assert len(found) == tensors
    assert max(found) < 1e-5


def message_of(part: str) -> str:
    """Return why a part is refused."""
    import torch

    from megalora.mends.layers import build_norm
    from megalora.mends.optimizer import FusedAdam

    config = SimpleNamespace(layernorm_zero_centered_gamma=False, normalization="L2Norm")
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
        ("norm", "normalization 'L2Norm' is not in torch: use RMSNorm or LayerNorm"),
        ("adam", "leave out --optimizer-cuda-graph"),
    ],
)
def test_what_torch_lacks_is_refused(part: str, message: str) -> None:
    assert message in call(message_of, part)


def norms_around_zero(normalization: str) -> tuple[list[list[float]], list[list[float]], float]:
    """Return a norm in bf16 of small weights, the same by its formula, and its first weight."""
    import torch

    from megalora.mends.layers import build_norm

    config = SimpleNamespace(
        layernorm_zero_centered_gamma=True, normalization=normalization, sequence_parallel=False
    )
    norm = build_norm(object, config, 8, eps=1e-6).bfloat16()  # type: ignore[arg-type]
    start = float(norm.weight[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # 1 + 0.003 is 1 in bf16.
        norm.weight.copy_(torch.arange(8) * 1e-3)
    x = torch.randn(4, 8, generator=generator).bfloat16()
    wide = x.double()
    wide = wide - wide.mean(-1, keepdim=True) if normalization == "LayerNorm" else wide
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = (expected * (1 + norm.weight.double())).bfloat16()
    return norm(x).tolist(), expected.tolist(), start


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_a_gamma_around_zero_is_added_to_one_in_fp32(normalization: str) -> None:
    found, expected, start = call(norms_around_zero, normalization)
    assert found == expected
    assert start == 0.0


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


def recomputed() -> bool:
    """Say whether a function's output can be given up and be made again, as for `gdn_norm_out`."""
    import torch
    from megatron.core.tensor_parallel.random import CheckpointWithoutOutput

    x = torch.ones(2, requires_grad=True)
    return CheckpointWithoutOutput().checkpoint(torch.exp, x).equal(x.exp())


def test_outputs_are_recomputed_without_transformer_engine() -> None:
    assert call(recomputed)
