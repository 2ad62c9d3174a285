"""`megalora check`: what a server will do with anybody's adapter, before it is started."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megalora.__main__ import main
from megalora.hf.peft import write_adapter
from megalora.hf.servers import SERVERS
from tests.test_servers import REFUSED, dense


def write_foreign(directory: Path, key: str, **config: Any) -> Path:
    """Write what another tool might: one projection, and one tensor more."""
    directory.mkdir()
    shape = {"q": (4, 8), "v": (4, 8)}
    prefix = "base_model.model.model.layers.0.self_attn"
    tensors = {f"{prefix}.{n}_proj.lora_A.weight": torch.ones(s) for n, s in shape.items()}
    tensors |= {f"{prefix}.{n}_proj.lora_B.weight": torch.ones(8, 4) for n in shape}
    save_file(
        {**tensors, **({key: torch.ones(2)} if key else {})},
        directory / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return directory


@pytest.mark.parametrize(
    ("server", "key", "config", "status", "said"),
    [
        ("vllm", "", {}, 0, "--enable-lora --max-lora-rank 8"),
        ("sglang", "", {}, 0, "--max-lora-rank 4 --lora-target-modules q_proj v_proj"),
        ("peft", "", {}, 0, "PEFT 0.21.2 takes it"),
        ("vllm", "base_model.model.lm_head.modules_to_save.weight", {}, 1, "factors alone"),
        ("sglang", "", {"use_rslora": True}, 1, "refused: SGLang 0.5.23 does not read use_rslora"),
        ("sglang", "", {"target_modules": None}, 1, "takes target_modules as a list"),
    ],
)
def test_check_says_what_happens_to_anybodys_adapter(
    server: str,
    key: str,
    config: dict[str, Any],
    status: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = write_foreign(tmp_path / "adapter", key, **config)
    assert main(["check", str(directory), "--for", server]) == status
    out = capsys.readouterr().out
    assert said in out
    assert "--hf-model DIR of the base was not given" in out


def test_check_goes_by_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_adapter(tmp_path / "adapter", dense(head=True), base_model_name="base")
    for family, status in {"qwen2": 1, "qwen3": 0}.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
        words = ["check", str(tmp_path / "adapter"), "--for", "vllm", "--hf-model", str(tmp_path)]
        assert main(words) == status
        assert "was not given" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "field",
    [{"r": "\x1b[31m"}, {"r": -1}, {"lora_alpha": "8"}, {"rank_pattern": {"q_proj": None}}],
    ids=lambda field: json.dumps(field),
)
@REFUSED
def test_check_names_a_field_that_is_no_number(
    field: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = write_foreign(tmp_path / "adapter", "", **field)
    for server in SERVERS:
        assert main(["check", str(directory), "--for", server]) == 2
        assert f"adapter_config {next(iter(field))}" in capsys.readouterr().err


@REFUSED
def test_a_directory_without_factors_is_no_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(tmp_path), "--for", "vllm"]) == 2
    assert "error:" in capsys.readouterr().err
