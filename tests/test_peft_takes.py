"""The verdicts on PEFT are those of the library itself, on real models of transformers."""

from pathlib import Path
from typing import Any

import pytest

from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import FORMATS, write_adapter
from megalora.hf.servers import SERVERS
from megalora.hf.servers.outline import outline_of_directory
from megalora.model.config_json import model_shape
from megalora.model.families import names_of
from megalora.model.served import ServedModel
from tests.support.hf_models import (
    hf_model,
    logits,
    merged,
    peft_model,
    random_factors,
    shared_outer,
)

RANKS = {"experts": (2, 4.0), "": (4, 2.0)}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "family",
    ["qwen2", "qwen3_moe", "mixtral", "qwen2_moe", "glm4_moe", "glm4_moe_lite"]
    + ["qwen3_next", "qwen3_5", "qwen3_5_moe", "mistral3", "nemotron_h", "phi3"],
)
def test_peft_agrees(family: str, format: Any, tmp_path: Path) -> None:
    model = hf_model(family)
    factors = shared_outer(random_factors(model, RANKS))
    if family == "nemotron_h":
        # Of Mamba-2's layers it refuses them.
        factors = {name: m for name, m in factors.items() if not name.endswith("out_proj")}
    shape = model_shape(model.config.to_dict())
    write_adapter(
        tmp_path / "a",
        factors,
        base_model_name="b",
        format=format,
        names=names_of(family),
        num_experts=shape.num_moe_experts or None,
        moe_layers=shape.moe_layers or None,
        delta_layers=shape.delta_layers,
    )
    served = ServedModel.of(model.config.to_dict() | {"architectures": [type(model).__name__]})
    found = SERVERS["peft"].judge(outline_of_directory(tmp_path / "a"), served)
    assert found.accepted == serves(model, tmp_path / "a", factors), found


def serves(model: Any, directory: Path, factors: dict[str, LoRAFactors]) -> bool:
    """Say whether PEFT loads all of an adapter, and its logits are those of the merged model."""
    try:
        loaded = logits(peft_model(model, directory))
    except (AssertionError, RuntimeError, ValueError):
        return False
    expected = logits(merged(model, factors))
    return bool((loaded - expected).norm() < 1e-4 * expected.norm())
