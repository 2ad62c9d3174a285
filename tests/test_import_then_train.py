"""`megalora import`, the flags that it prints, a run by them, `megalora export`: as typed.

Real peft makes the adapters, and says what loss each has on its base.
"""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from megalora.data import ByteTokenizer
from tests.support.forked import ROOT, Ranks, call
from tests.support.tiny import TRAIN, flags

EXAMPLE = ROOT / "examples" / "pretrain_lora.py"
# More than the byte tokenizer has tokens, and not what Megatron pads them to.
ROWS = 270
SUMS = [("1+1=", "2"), ("2+3=", "5"), ("10+7=", "17"), ("9+9=", "18")]
RUN = shlex.split("""
--byte-tokenizer --no-packing --train-iters 1 --micro-batch-size 2 --seq-length 16 --lr 0 --min-lr 0
--transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm
--no-bias-swiglu-fusion --no-rope-fusion --no-masked-softmax-fusion
--attention-dropout 0 --hidden-dropout 0
""")

# By name: the base, what peft is told, and what the printed flags must select.
ADAPTERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "q and v": ("tied", {"r": 4, "target_modules": ["q_proj", "v_proj"]}, "linear_qkv"),
    "one layer": (
        "tied",
        {"r": 4, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        "decoder.layers.1.mlp.linear_fc2 decoder.layers.1.self_attention.linear_qkv",
    ),
    "unembedding": ("tied", {"r": 4, "target_modules": ["lm_head"]}, "output_layer"),
    # Its alpha / r has no end.
    "rsLoRA": (
        "untied",
        {"r": 3, "use_rslora": True, "target_modules": "all-linear"},
        "linear_fc1 linear_fc2 linear_proj linear_qkv",
    ),
    # No rank that the active experts divide.
    "attention beside experts": (
        "moe",
        {"r": 3, "target_modules": ["q_proj", "k_proj", "v_proj"]},
        "linear_qkv",
    ),
    "experts": ("moe", {}, "linear_fc1 linear_fc2 linear_proj linear_qkv output_layer"),
}


def make(place: Path) -> dict[str, tuple[float, str]]:
    """Write bases and adapters and import these; return each one's loss, and what import said."""
    from megalora.hf.peft import write_adapter
    from tests.support.hf_models import hf_model, random_factors

    families = {"tied": "llama", "untied": "qwen3", "moe": "qwen3_moe"}
    models = {
        name: hf_model(family, tied=name == "tied", vocab_size=ROWS)
        for name, family in families.items()
    }
    for name, model in models.items():
        model.save_pretrained(str(place / name))
    made = {}
    for name, (base, config, _) in ADAPTERS.items():
        adapter = place / f"{name} adapter"
        if config:
            save_by_peft(models[base], adapter, config)
        else:
            ranks = {"experts": (2, 4.0), "": (4, 2.0)}
            write_adapter(adapter, random_factors(models[base], ranks), base_model_name="")
        imported = ["import", adapter, "--hf-model", place / base, "--output", place / name]
        made[name] = (loss_by_peft(models[base], adapter), said_by(*imported))
    said_by("import-base", "--hf-model", place / "moe", "--output", place / "megatron")
    made["flags"] = (0.0, said_by("flags", "--hf-model", place / "moe"))
    made["older"] = (0.0, export_of_older(place))
    return made


def export_of_older(place: Path) -> str:
    """Return how an export of what an older megalora imported ends, which says less of its base."""
    from megalora.hf import one_process

    one_process._sizes = lambda shape: {}
    older, adapter = place / "older", place / "unembedding adapter"
    said_by("import", adapter, "--hf-model", place / "tied", "--output", older)
    said = said_by("export", older, "--output", place / "never", status=2)
    said_by("export", older, "--vocab-size", ROWS, "--output", place / "told")
    return said


def save_by_peft(model: Any, directory: Path, config: dict[str, Any]) -> None:
    import copy

    import peft
    import torch

    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(lora_alpha=16, **config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(directory))


def loss_by_peft(model: Any, adapter: Path) -> float:
    """Return the mean loss over the tokens of all answers."""
    import torch

    from tests.support.hf_models import peft_model

    adapted, tokenizer, losses = peft_model(model, adapter), ByteTokenizer(), []
    for prompt, completion in SUMS:
        asked = [tokenizer.bos, *tokenizer.tokenize(prompt)]
        answer = torch.tensor([*tokenizer.tokenize(completion), tokenizer.eos])
        ids = torch.cat([torch.tensor(asked), answer])
        with torch.no_grad():
            logits = adapted(ids[None]).logits[0, len(asked) - 1 : -1]
        losses += torch.nn.functional.cross_entropy(logits, answer, reduction="none").tolist()
    return sum(losses) / len(losses)


def said_by(*words: object, status: int = 0) -> str:
    """Return what a command prints; the last words on its errors."""
    from tests.support.hf_commands import run

    ended, out, errors = run([str(word) for word in words])
    assert ended == status, errors
    return out + errors


class Place:
    """A directory with bases, adapters and their imports, named as in ADAPTERS."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        rows = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in SUMS]
        (directory / "sums.jsonl").write_text("\n".join(rows))
        self.made: dict[str, tuple[float, str]] = call(make, directory)

    def printed(self, name: str) -> list[str]:
        """Return the flags that import printed."""
        line = next(line for line in self.made[name][1].splitlines() if "train on with: " in line)
        return shlex.split(line.partition(": ")[2])

    def run(self, name: str, layout: str) -> Path:
        """Return where a run on a layout saves."""
        return self.directory / f"{name} run {layout}"

    def start(self, *words: object, logs: str, world_size: int = 1) -> Ranks:
        """Start the example on all sums at a rate of zero."""
        data = ["--dataset", self.directory / "sums.jsonl"]
        given = [*TRAIN, *RUN, *data, *words]
        return Ranks(
            world_size, given, self.directory / f"{logs} logs", script=EXAMPLE, by_megalora=False
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("imports"))


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_printed_flags_select_what_the_adapter_has(name: str, place: Place) -> None:
    printed = place.printed(name)
    assert shlex.join(printed).endswith(f"--lora-targets {ADAPTERS[name][2]}")
    assert printed[printed.index("--load") + 1] == str(place.directory / name)


def test_what_starts_without_factors_is_said(place: Place) -> None:
    said = place.made["one layer"][1]
    new = "model.layers.*.self_attn.k_proj, model.layers.*.self_attn.v_proj"
    assert f"which trains {new} too, without factors in the adapter" in said
    assert "without factors" not in place.made["experts"][1]


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "") for name in ADAPTERS), ("unembedding", "tp2 sp"), ("experts", "tp2 sp")],
)
def test_a_run_by_the_printed_flags_begins_where_the_adapter_is(
    name: str, layout: str, place: Place
) -> None:
    words = [*place.printed(name), *flags(layout), "--save", place.run(name, layout)]
    run = place.start(*words, logs=f"{name} {layout}", world_size=2 if layout else 1)
    # Iteration 1 and a new optimizer, without a flag that says so.
    assert run.succeed().losses() == {1: pytest.approx(place.made[name][0], abs=2e-6)}


@pytest.mark.parametrize("name", ["one layer", "experts"])
def test_lora_load_takes_the_printed_flags_too(name: str, place: Place) -> None:
    printed = ["--lora-load" if word == "--load" else word for word in place.printed(name)]
    run = place.start(*printed, logs=f"{name} weights").succeed()
    assert run.losses() == {1: pytest.approx(place.made[name][0], abs=2e-6)}


def test_an_import_of_an_older_megalora_goes_on_too(place: Place, tmp_path: Path) -> None:
    copy = shutil.copytree(place.directory / "q and v", tmp_path / "older")
    (copy / "release").rename(copy / "iter_0000000")
    (copy / "latest_checkpointed_iteration.txt").write_text("0")
    words = ["--hf-model", place.directory / "tied", "--load", copy, "--lora-rank", 4]
    run = place.start(*words, logs="older").succeed()
    assert run.losses() == {1: pytest.approx(place.made["q and v"][0], abs=2e-6)}


def test_adapters_that_the_flags_do_not_describe_are_refused_with_the_flags(place: Place) -> None:
    words = ["--hf-model", place.directory / "tied", "--lora-load", place.directory / "q and v"]
    text = place.start(*words, "--lora-rank", 4, "--lora-alpha", 16, logs="others").fail()
    assert "It was made with --lora-rank 4 --lora-alpha 16 --lora-targets linear_qkv" in text


def test_an_export_of_an_older_megalora_asks_for_the_vocabulary(place: Place) -> None:
    assert "give --hf-model DIR, or --vocab-size (vocab_size in" in place.made["older"][1]
    assert not (place.directory / "never").exists()
    assert (place.directory / "told" / "adapter_model.safetensors").is_file()


def exported(run: Path, base: str, output: Path) -> tuple[float, int]:
    """Return the loss by peft of what `megalora export RUN` wrote, and the rows of lm_head."""
    from safetensors import safe_open

    from tests.support.hf_models import hf_model_from

    said_by("export", run, "--output", output)
    rows = 0
    with safe_open(output / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118
            if "lm_head.lora_B" in key:
                rows = file.get_slice(key).get_shape()[0]
    return loss_by_peft(hf_model_from(run.parent / base), output), rows


def test_a_base_of_import_base_is_known_to_its_runs_and_exports(place: Place) -> None:
    words = shlex.split(place.made["flags"][1])
    # As of a script that leaves it to the tokenizer, which has fewer tokens.
    at = words.index("--vocab-size")
    words = [*words[:at], *words[at + 2 :], "--pretrained-checkpoint", place.directory / "megatron"]
    run = place.directory / "on megatron"
    words += [*place.printed("experts")[2:], "--save", run]
    place.start(*words, logs="megatron").succeed()
    loss, rows = call(exported, run, "moe", place.directory / "out of megatron")
    assert (loss, rows) == (pytest.approx(place.made["experts"][0], abs=2e-6), ROWS)


@pytest.mark.parametrize("layout", ["", "tp2 sp"])
@pytest.mark.parametrize("name", ["unembedding", "experts"])
def test_a_run_is_exported_without_being_told_its_base(
    name: str, layout: str, place: Place
) -> None:
    run = place.run(name, layout)
    loss, rows = call(exported, run, ADAPTERS[name][0], run.with_name(f"{run.name} exported"))
    assert loss == pytest.approx(place.made[name][0], abs=2e-6)
    assert rows == ROWS
