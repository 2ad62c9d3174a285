"""Ranks that hold the same part of a base are found where one has other bits of it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megalora.training.replicas import bits_of, check_replicas
from tests.dist.support.cases import (
    CP2,
    DP2,
    EP2,
    EP2_ETP2,
    ETP2,
    KINDS,
    PP2,
    TP2,
    TP2_DP2,
    TP2_EP2,
)
from tests.dist.support.layouts import Layout, model_parallel, over, world
from tests.dist.support.models import build_model

# What the last rank of a layout holds as another does: the kind of model, and a weight.
COPIES = [
    (DP2, "dense", "self_attention.linear_qkv.weight"),
    (CP2, "dense", "mlp.linear_fc2.weight"),
    (TP2, "dense", "pre_mlp_layernorm.weight"),
    (TP2_DP2, "dense", "mlp.linear_fc1.weight"),
    (PP2, "tied embeddings", "output_layer.weight"),
    (TP2_EP2, "experts", "mlp.router.weight"),
    (EP2, "experts", "mlp.router.weight"),
    (Layout(dp=4, ep=2), "experts", "mlp.experts.local_experts.0.linear_fc2.weight"),
    (Layout(pp=2, vpp=2, dp=2), "dense of 4 layers", "mlp.linear_fc1.weight"),
    (DP2, "hybrid", "mixer.in_proj.weight"),
]


def model_of(layout: Layout, kind: str) -> list[Any]:
    return build_model(layout, **KINDS[kind].model)


@over(Layout(), TP2, DP2, CP2, PP2, TP2_DP2)
@pytest.mark.parametrize("kind", ["dense", "tied embeddings", "hybrid"])
def test_a_base_that_all_hold_alike_is_taken(kind: str, layout: Layout) -> None:
    with model_parallel(layout):
        check_replicas(model_of(layout, kind))


@over(EP2, TP2_EP2, ETP2, EP2_ETP2, Layout(dp=4, ep=2))
@pytest.mark.parametrize("kind", ["shared experts", "hybrid with experts"])
def test_experts_that_all_hold_alike_are_taken(kind: str, layout: Layout) -> None:
    with model_parallel(layout):
        check_replicas(model_of(layout, kind))


@over(TP2)
@pytest.mark.parametrize("kind", ["latent attention", "ungated with biases"])
def test_other_layers_that_all_hold_alike_are_taken(kind: str, layout: Layout) -> None:
    with model_parallel(layout):
        check_replicas(model_of(layout, kind))


@pytest.mark.bad_input("a rank that disagrees")
@pytest.mark.parametrize(
    ("layout", "kind", "name"),
    [pytest.param(*copy, id=f"{copy[0]} {copy[2]}", marks=world(copy[0])) for copy in COPIES],
)
def test_one_bit_of_a_copy_ends_all_ranks(layout: Layout, kind: str, name: str) -> None:
    last = dist.get_world_size() - 1
    with model_parallel(layout):
        chunks = model_of(layout, kind)
        if dist.get_rank() == last:
            flip(chunks, name)
        with pytest.raises(ValueError, match=f"ranks disagree: base weight .* on rank {last} "):
            check_replicas(chunks)


def flip(chunks: list[Any], name: str) -> None:
    """Change the lowest bit of one element."""
    weights = [p for chunk in chunks for n, p in chunk.named_parameters() if n.endswith(name)]
    (weight, *_) = weights or [chunks[-1].shared_embedding_or_output_weight()]
    weight.data.view(-1)[-1:].view(torch.uint8)[0] ^= 1


@pytest.mark.world_1
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_tell_every_change_and_every_exchange_of_two_values(dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    own = bits_of(tensor)
    assert bits_of(tensor.clone()) == bits_of(tensor.T.contiguous().T) == own
    for place in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1)[place] *= -1
        assert bits_of(other) != own
    exchanged = tensor.flip(0)
    assert bits_of(exchanged) != own


@pytest.mark.world_1
def test_bits_do_not_depend_on_the_chunks_that_are_hashed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensor = torch.randn(1000)
    whole = bits_of(tensor)
    monkeypatch.setattr("megalora.training.replicas._CHUNK", 7)
    assert bits_of(tensor) == whole
