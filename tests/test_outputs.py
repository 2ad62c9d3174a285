"""--export-hf and --save-merged: refused before the first step, written on every orderly end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.forked import Ranks, call
from tests.support.tiny import LORA, MODEL, TRAIN


def start(logs: Path, *more: object) -> Ranks:
    return Ranks(1, [*MODEL, *TRAIN, *LORA, "--train-iters", 6, *more], logs)


@pytest.mark.parametrize(
    "end",
    [["--exit-interval", "2"], ["--exit-signal-handler", "--exit-signal", "SIGUSR1"]],
    ids=["an interval", "a signal without --save"],
)
def test_an_early_end_writes_what_is_asked_for(end: list[str], tmp_path: Path) -> None:
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    more = [*end, "--export-hf", adapter, "--save-merged", merged, "--train-iters", 300]
    run = start(tmp_path / "logs", *more)
    if "--exit-signal" in end:
        run.wait_until(lambda: 2 in run.losses())
        run.ask()
    run.succeed()
    assert 2 <= max(run.losses()) < 300
    assert (adapter / "adapter_config.json").is_file()
    assert (merged / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_what_has_no_hugging_face_name_is_refused_before_training(tmp_path: Path) -> None:
    more = ["--mtp-num-layers", "1", "--lora-targets", "eh_proj"]
    more += ["--export-hf", tmp_path / "adapter"]
    run = start(tmp_path / "logs", *more)
    text = run.fail()
    assert "eh_proj has no adapter in Hugging Face's models: train with --lora-targets" in text
    assert run.losses() == {}


def named_like(base: Path) -> list[str]:
    """Return the family by which an export names modules, before and after its base is gone."""
    from megalora.hf.exchange import model_shape

    sizes = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    config = SimpleNamespace(**dict.fromkeys(sizes, 4))
    chunk: Any = SimpleNamespace(config=config, named_modules=dict)
    before = model_shape([chunk], str(base)).model_type
    (base / "config.json").unlink()
    return [before, model_shape([chunk], str(base)).model_type]


def test_an_export_names_modules_like_its_base_even_where_that_has_gone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert call(named_like, tmp_path) == ["qwen3", "qwen3"]
