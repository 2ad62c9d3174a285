"""A base that other layers of Megatron saved than those that read it."""

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megalora.checkpoint.base import _load_by_stored_names

TE_NORM = "decoder.layers.pre_mlp_layernorm.weight"
OWN_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


@pytest.mark.world_1
@pytest.mark.parametrize(("saved", "read"), [(OWN_NORM, TE_NORM), (TE_NORM, OWN_NORM)])
def test_a_base_is_read_by_the_other_kind_of_layers(saved: str, read: str, tmp_path: Path) -> None:
    norm = torch.randn(8)
    dist_checkpointing.save({"norm": ShardedTensor.from_rank_offsets(saved, norm)}, tmp_path)
    wanted = {
        "norm": ShardedTensor.from_rank_offsets(read, torch.zeros(8)),
        "extra": ShardedObject("decoder.final_layernorm._extra_state", None, (1,), (0,)),
    }
    found = _load_by_stored_names(str, wanted, str(tmp_path))
    assert found["norm"].equal(norm)
    assert "extra" not in found


@pytest.mark.world_1
def test_a_weight_that_a_base_lacks_is_an_error(tmp_path: Path) -> None:
    stored = ShardedTensor.from_rank_offsets("decoder.weight", torch.zeros(8))
    dist_checkpointing.save({"weight": stored}, tmp_path)
    wanted = {"other": ShardedTensor.from_rank_offsets("decoder.other", torch.zeros(8))}
    with pytest.raises(CheckpointException, match=r"decoder\.other"):
        _load_by_stored_names(str, wanted, str(tmp_path))
