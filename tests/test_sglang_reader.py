"""The verdicts on SGLang are those of its own reader of adapters.

`make servers` fetches it; without it these tests skip. What runs of it, and what are stubs,
tests/support/sglang_reader.py says.
"""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import load_file

from megalora.hf.peft import FORMATS
from tests.support import sglang_reader
from tests.support.served_adapters import (
    TENSORS,
    change_tensors,
    config_of,
    factors_of,
    rewrite,
    verdict,
    written,
)
from tests.support.server_stubs import SERVERS

has_sglang = pytest.mark.skipif(
    not (SERVERS / sglang_reader.FOLDER).is_dir(),
    reason="SGLang's reader is not there: make servers",
)


@pytest.fixture(scope="module")
def sglang() -> Iterator[sglang_reader.Reader]:
    with sglang_reader.sglang() as reader:
        yield reader


@pytest.mark.parametrize("head", [True, False], ids=["lm_head", "no lm_head"])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "family",
    ["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "qwen2_moe", "glm4_moe", "qwen3_next"],
)
@has_sglang
def test_sglang_agrees(
    family: str, format: str, head: bool, sglang: sglang_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (2, 4), head=head), format, family)
    found, refusal = verdict("sglang", directory, config), sglang.refusal(directory, config)
    assert found.accepted == (not refusal), (found, refusal)


@pytest.mark.parametrize("change", TENSORS)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@has_sglang
def test_sglang_agrees_on_adapters_of_some_modules(
    family: str, change: str, sglang: sglang_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (4, 4), head=False), "uniform", family)
    change_tensors(directory, change)
    found, refusal = verdict("sglang", directory, config), sglang.refusal(directory, config)
    served_whole = not refusal and not lost(sglang, directory, config)
    assert found.accepted == served_whole, (found, refusal)


@pytest.mark.parametrize(
    ("change", "loads"),
    [
        ({"use_rslora": True}, True),
        ({"alpha_pattern": {"q_proj": 99}}, True),
        ({"use_dora": True}, False),
        ({"target_modules": "q_proj|v_proj"}, False),
        ({"target_modules": "all-linear"}, True),
    ],
)
@has_sglang
def test_sglang_loads_wrongly_what_is_refused_here(
    change: dict[str, Any], loads: bool, sglang: sglang_reader.Reader, tmp_path: Path
) -> None:
    config = config_of("llama")
    directory = written(tmp_path, factors_of("llama", (1, 4), head=False), "uniform", "llama")
    rewrite(directory, **change)
    assert (sglang.refusal(directory, config) == "") == loads
    scaled = sglang.load(directory, config).loras["adapter"].scaling if loads else 0
    accepted = verdict("sglang", directory, config).accepted
    # Its scale is lora_alpha / r, whatever else is said.
    assert accepted == (loads and "target_modules" in change)
    assert scaled in (0, 1)


def lost(reader: sglang_reader.Reader, directory: Path, config: SimpleNamespace) -> bool:
    """Say whether SGLang takes an adapter and serves less than all of it."""
    factors = load_file(directory / "adapter_model.safetensors")
    given = sum(float(t.abs().sum()) for n, t in factors.items() if "lora_A" in n)
    pool = reader.load(directory, config).memory_pool
    slot = pool.uid_to_buffer_id["adapter"]
    places = [layer[slot] for layers in pool.A_buffer.values() for layer in layers]
    kept = sum(float(place.abs().sum()) for place in places)
    others = any("lora_" not in n and "base_layer" not in n for n in factors)
    others = others or any("magnitude" in n for n in factors)
    return others or abs(given - kept) > 1e-3 * given
