"""The commands that exchange with Hugging Face, through the command line itself."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import read_adapter, write_adapter
from tests.support.forked import with_root
from tests.support.hf_models import (
    LAYERS,
    NUM_EXPERTS,
    hf_model,
    hf_model_from,
    logits,
    merged,
    peft_model,
    random_factors,
)
from tests.support.watchdog import run_watched

ROOT = Path(__file__).parent.parent
# Alpha 32 for all: 32 / 8 and 32 / 4.
RANKS = {"experts": (4, 8.0), "": (8, 4.0)}


COMMANDS = {
    "import": "import peft --hf-model base --output imported --padded-vocab-size 72",
    "export": "export imported --hf-model base --base-name tiny --output exported",
    "export without base": "export imported --output exported-alone",
    "export of other rows": "export imported --vocab-size 60 --output never",
    "export of another base": "export imported --hf-model dense --output never",
    "export uniform": "export imported --hf-model base --format uniform --output uniform",
    "export for sglang": "export imported --hf-model base --export-for sglang --output for-sglang",
    "export for two": "export imported --hf-model base --export-for peft --format tinker "
    "--output never",
    "import higher": "import peft --hf-model base --output higher --rank 16 --expert-rank 6",
    "export higher": "export higher --hf-model base --output exported-higher",
    "merge": "merge peft --hf-model base --output merged",
    "merge again": "merge peft --hf-model base --output merged",
    "merge truncated": "merge truncated --hf-model base --output never",
    "merge other": "merge other --hf-model base --output never",
    "merge into nothing": "merge peft --hf-model nowhere --output never",
    "inspect": "inspect peft",
    "inspect checkpoint": "inspect imported --json",
    "inspect base": "inspect base",
    "import-base": "import-base --hf-model base --output base-ckpt --dtype float32",
    "compare": "compare-base base base-ckpt",
    "import-base tied": "import-base --hf-model dense --output dense-ckpt --dtype float32",
    "compare tied": "compare-base dense dense-ckpt",
    "flags": "flags --hf-model base",
    "export a base": "export base-ckpt/release --output never",
}


@pytest.fixture(scope="module")
def factors() -> dict[str, LoRAFactors]:
    return random_factors(hf_model("qwen3_moe"), RANKS)


@pytest.fixture(scope="module")
def place(tmp_path_factory, factors) -> Path:
    """Return a directory with bases, adapters, and what the commands made of them."""
    place = tmp_path_factory.mktemp("cli")
    hf_model("qwen3_moe").save_pretrained(str(place / "base"))
    hf_model("qwen3", tied=True).save_pretrained(str(place / "dense"))
    write_adapter(place / "peft", factors, base_model_name="tiny")
    write_adapter(place / "truncated", factors, base_model_name="tiny")
    path = place / "truncated" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    other = {"model.layers.9.mlp.up_proj": factors["lm_head"]}
    write_adapter(place / "other", other, base_model_name="tiny")
    commands = [command.split() for command in COMMANDS.values()]
    (place / "commands.json").write_text(json.dumps(commands))
    finished = run_watched(
        [sys.executable, "-m", "tests.support.hf_commands", "commands.json", "results.json"],
        place,
        cwd=place,
        env={**os.environ, "PYTHONPATH": with_root(), "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return place


@pytest.fixture
def said(place):
    """Return what a command said: (exit status, output, errors)."""
    results = json.loads((place / "results.json").read_text())
    return dict(zip(COMMANDS, results, strict=True))


SUCCEED = [name for name in COMMANDS if "never" not in COMMANDS[name]]
SUCCEED = [name for name in SUCCEED if name not in ("merge again", "inspect base")]


@pytest.mark.parametrize("name", SUCCEED)
def test_the_command_succeeds(name, said):
    status, _, errors = said[name]
    assert status == 0, errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("export of other rows", "vocab_size is 60 but checkpoint imported has 66"),
        ("export of another base", "num_moe_experts is 0 but checkpoint imported has 16"),
        ("export a base", "no adapters"),
        ("export for two", "format 'tinker' and export_for 'peft' contradict each other"),
        ("merge again", "is not empty"),
        ("merge truncated", "not a whole safetensors file"),
        ("merge other", "model.layers.9.mlp.up_proj"),
        (
            "merge into nothing",
            "nowhere is no directory here: give one that has a model's config.json",
        ),
        ("inspect base", "is a whole model, no adapter"),
    ],
)
def test_a_wrong_command_says_why_and_leaves_nothing(name, message, said, place):
    status, _, errors = said[name]
    assert status == 2
    assert errors.startswith("error: ")
    assert message in errors
    assert not (place / "never").exists()
    assert not list(place.glob(".*")), "nothing half written stays"


def test_export_of_an_import_is_the_same_directory_bit_for_bit(place):
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (place / "peft" / file).read_bytes() == (place / "exported" / file).read_bytes()


def test_export_needs_no_base(place):
    file = "adapter_model.safetensors"
    alone = place / "exported-alone"
    assert (place / "peft" / file).read_bytes() == (alone / file).read_bytes()
    config = json.loads((alone / "adapter_config.json").read_text())
    expected = json.loads((place / "peft" / "adapter_config.json").read_text())
    assert config == {**expected, "base_model_name_or_path": ""}


def test_an_export_for_a_server_has_its_format_and_says_what_it_needs(place, said):
    file = "adapter_model.safetensors"
    assert (place / "uniform" / file).read_bytes() == (place / "for-sglang" / file).read_bytes()
    out = said["export for sglang"][1]
    assert "SGLang 0.5.23 takes it; the largest rank is 8; start it with --enable-lora" in out


def test_a_higher_rank_keeps_the_update(place, factors):
    higher = read_adapter(place / "exported-higher")
    assert higher["lm_head"].rank == 16
    assert higher["model.layers.1.mlp.experts.12.up_proj"].rank == 6
    for name, module in factors.items():
        torch.testing.assert_close(higher[name].delta(), module.delta(), atol=2e-6, rtol=1e-5)


def test_what_the_commands_wrote_has_the_logits_of_the_merged_model(place, factors):
    model = hf_model("qwen3_moe")
    expected = logits(merged(model, factors))
    for found in (hf_model_from(place / "merged"), peft_model(model, place / "uniform")):
        torch.testing.assert_close(logits(found), expected, atol=5e-6, rtol=1e-5)


def test_the_base_checkpoint_has_every_weight(said):
    assert said["compare"][1] == f"{3 + LAYERS * (7 + 2 * NUM_EXPERTS)} compared"
    assert said["compare tied"][1] == f"{2 + LAYERS * 8} compared"


def test_summaries_count_what_was_done(said, factors):
    count = sum(module.num_parameters for module in factors.values())
    for name in ("import", "export", "merge"):
        assert f"{len(factors)} modules, {count:,} parameters" in said[name][1]
    assert "--lora-rank 8 --lora-alpha 32 --lora-expert-rank 4" in said["import"][1]
    assert f"{count:,} parameters" in said["inspect"][1]
    assert json.loads(said["inspect checkpoint"][1])["num_parameters"] == count
    assert "--num-experts 16" in said["flags"][1]
