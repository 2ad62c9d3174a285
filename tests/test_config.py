"""What LoRAConfig accepts, how it scales, and what it says about mistakes."""

import argparse
import dataclasses
import json
import math
from typing import Any

import pytest
import torch

from megalora.arguments import add_lora_args, flags_of, lora_config_from_args
from megalora.config import LoRAConfig, field_texts
from megalora.targets import PRESETS


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


NUMBERS = pytest.mark.bad_input("a number that is not one")
HUGE = 10**400
INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ()}, "lora_targets is .*at least one preset or name"),
        ({"expert_mode": "shared"}, "lora_expert_mode is 'shared': .*per_expert, shared_outer"),
        ({"init": "zeros"}, "lora_init is 'zeros': .*uniform, pissa"),
        ({"ops": "cuda"}, "lora_ops is 'cuda': .*fused, reference"),
        ({"init": "pissa", "expert_mode": "shared_outer"}, "lora_init is 'pissa'.*shared_outer"),
        ({"init": "pissa", "shared_a": True}, "lora_init is 'pissa'.*shared_a"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**{"rank": 8, **fields})


REFUSED: dict[str, tuple[str, list[object]]] = {
    "rank": ("an integer >= 1 and <= 65536", [0, -1, 65537, HUGE, True, 4.0, NAN, INF, "8", None]),
    "expert_rank": ("an integer >= 1.*leave it out", [0, 65537, True, 2.0, "8"]),
    "alpha": (
        "a number > 0, from 1e-30 to 1e",
        [0, -1.0, 1e-31, 1e31, HUGE, True, NAN, INF, -INF, "32", None, [1], 1j],
    ),
    "dropout": ("a probability in", [1.0, -0.1, True, False, NAN, INF, HUGE, "0", None]),
    "seed": ("an integer >= 0", [-1, 1.0, True, "1", NAN]),
    "lr_ratio": ("a finite number > 0", [0.0, -1, True, NAN, INF, HUGE, "16", None]),
    "eps_a": ("a finite number >= 0", [-1e-8, True, NAN, INF, HUGE, "0"]),
    "eps_b": ("a finite number >= 0", [-1e-8, True, NAN, INF, HUGE, "0"]),
    "rslora": ("true or false", [1, "no", None]),
    "shared_a": ("true or false", [0, "no", None]),
}


@NUMBERS
@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, (_, values) in REFUSED.items() for value in values],
    ids=lambda value: "10**400" if value is HUGE else str(value),
)
def test_what_is_no_number_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"lora_{field} is .*: it must be {REFUSED[field][0]}"):
        LoRAConfig(**{"rank": 8, field: value})


FLAGS = {
    "--lora-rank": ["-1", "65537", "9" * 400],
    "--lora-expert-rank": ["0", "65537"],
    "--lora-alpha": ["inf", "nan", "1e39", "1e999", "0", "-1"],
    "--lora-dropout": ["nan", "inf", "1"],
    "--lora-lr-ratio": ["inf", "nan", "0"],
    "--lora-eps-a": ["inf", "nan", "-1"],
    "--lora-eps-b": ["inf", "nan", "-1"],
}


@NUMBERS
@pytest.mark.parametrize(
    ("flag", "value"), [(flag, value) for flag, values in FLAGS.items() for value in values]
)
def test_flags_that_are_no_numbers_are_refused_by_name(flag: str, value: str) -> None:
    parser = add_lora_args(argparse.ArgumentParser())
    args = parser.parse_args(["--lora-rank", "8", f"{flag}={value}"])
    with pytest.raises(ValueError, match=f"{flag[2:].replace('-', '_')} is .*: it must be "):
        lora_config_from_args(args)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"alpha": 27.712812921102042, "rslora": True, "targets": ("attn", "*.1.mlp.linear_fc1")},
        {"alpha": 1e30, "expert_rank": 2, "expert_mode": "shared_outer", "dropout": 0.5},
        {"shared_a": True, "seed": 7, "lr_ratio": 16.0, "eps_b": 1e-12, "ops": "reference"},
        {"init": "pissa", "eps_a": 0.0, "kind": "other"},
    ],
)
def test_the_flags_of_a_configuration_give_it_again(fields: dict[str, Any]) -> None:
    config = LoRAConfig(rank=8, **fields)
    parser = add_lora_args(argparse.ArgumentParser())
    assert lora_config_from_args(parser.parse_args(flags_of(config))) == config


@pytest.mark.parametrize("fields", [{"rank": 1 << 16}, {"alpha": 1e-30}, {"alpha": 10**30}])
def test_the_bounds_themselves_are_taken(fields: dict[str, Any]) -> None:
    config = LoRAConfig(**{"rank": 8, **fields})
    tiny = torch.finfo(torch.float32).tiny
    assert tiny < float(torch.tensor(config.scale(config.rank), dtype=torch.float32)) < math.inf


def test_the_docstring_names_every_field_and_every_preset_of_targets() -> None:
    texts = field_texts()
    assert list(texts) == [field.name for field in dataclasses.fields(LoRAConfig)]
    for preset in PRESETS:
        assert f"`{preset}`" in texts["targets"]


def test_a_flag_says_what_the_docstring_says_of_its_field() -> None:
    helps = {a.dest: a.help or "" for a in add_lora_args(argparse.ArgumentParser())._actions}
    assert helps["lora_lr_ratio"] == f"{field_texts()['lr_ratio'].removesuffix('.')} (default 1)"
    assert helps["lora_rank"].endswith("(default 0: no LoRA)")
    assert "with --lora-rslora" in helps["lora_alpha"]
    for name, text in field_texts().items():
        assert text.split("`")[0].removesuffix(".") in helps[f"lora_{name}"]


def test_fields_survive_json() -> None:
    config = LoRAConfig(rank=8, targets=("attn", "output_layer"), expert_rank=2, eps_b=1e-6)
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LoRAConfig has no field \['ranks'\]"):
        LoRAConfig.from_dict({"ranks": 8})


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoRAConfig(rank=8).rank = 4  # type: ignore[misc]
