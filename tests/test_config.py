"""What LoRAConfig accepts, how it scales, and what it says about mistakes."""

import dataclasses
import json
import math
from typing import Any

import pytest

from megalora.config import LoRAConfig


def test_defaults_are_the_articles() -> None:
    config = LoRAConfig(rank=32)
    assert (config.alpha, config.dropout, config.targets) == (32.0, 0.0, ("all",))
    assert (config.expert_mode, config.shared_a, config.init) == ("per_expert", False, "uniform")


def test_scale_is_alpha_over_rank() -> None:
    assert LoRAConfig(rank=8, alpha=16).scale(8) == 2.0
    assert LoRAConfig(rank=8, alpha=16).scale(2) == 8.0
    assert LoRAConfig(rank=8, alpha=16, rslora=True).scale(4) == 16 / math.sqrt(4)


def test_an_experts_rank_is_the_rank_over_the_active_experts() -> None:
    assert LoRAConfig(rank=32).resolve_expert_rank(8) == 4
    assert LoRAConfig(rank=30, expert_rank=5).resolve_expert_rank(8) == 5
    assert LoRAConfig(rank=30, expert_mode="shared_outer").resolve_expert_rank(8) == 30


def test_an_indivisible_rank_names_the_ranks_that_work() -> None:
    remedy = "use 8, 16, 24, ... or set --lora-expert-rank"
    with pytest.raises(ValueError, match=f"12 is not divisible by moe_router_topk 8: {remedy}"):
        LoRAConfig(rank=12).resolve_expert_rank(8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "lora_rank is 0: it must be an integer >= 1"),
        ({"rank": True}, "lora_rank is True"),
        ({"rank": 4.0}, "lora_rank is 4.0"),
        ({"alpha": 0}, "lora_alpha is 0: it must be a number > 0"),
        ({"dropout": 1.0}, r"lora_dropout is 1.0: it must be a probability in \[0, 1\)"),
        ({"dropout": -0.1}, "lora_dropout is -0.1"),
        ({"targets": ()}, "lora_targets is .*at least one preset or name"),
        ({"expert_rank": 0}, "lora_expert_rank is 0: .*leave it out"),
        ({"expert_mode": "shared"}, "lora_expert_mode is 'shared': .*per_expert, shared_outer"),
        ({"init": "zeros"}, "lora_init is 'zeros': .*uniform, pissa"),
        ({"ops": "cuda"}, "lora_ops is 'cuda': .*fused, reference"),
        ({"seed": -1}, "lora_seed is -1"),
        ({"lr_ratio": 0.0}, "lora_lr_ratio is 0.0"),
        ({"eps_a": -1e-8}, "lora_eps_a is -1e-08"),
        ({"init": "pissa", "expert_mode": "shared_outer"}, "lora_init is 'pissa'.*shared_outer"),
        ({"init": "pissa", "shared_a": True}, "lora_init is 'pissa'.*shared_a"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**{"rank": 8, **fields})


def test_fields_survive_json() -> None:
    config = LoRAConfig(rank=8, targets=("attn", "output_layer"), expert_rank=2, eps_b=1e-6)
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LoRAConfig has no field \['ranks'\]"):
        LoRAConfig.from_dict({"ranks": 8})


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAConfig(rank=8).rank = 4  # type: ignore[misc]
