"""`megalora run` on a hybrid model's script: its checkpoints on other layouts, and refusals."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from tests.support.forked import ROOT, SCRIPT, Ranks, call
from tests.support.tiny import EXPERTS, HYBRID, LORA, MODEL, TRAIN, back_to, flags, read_all, train

EXAMPLE = ROOT / "examples" / "pretrain_lora.py"
HYBRID_SCRIPT = SCRIPT.with_name("pretrain_hybrid.py")
HYBRID_MODEL = [*MODEL, *EXPERTS, *HYBRID]
IN_PROJ = "decoder.layers.0.mixer.in_proj_lora.lora_B"
PARTS = ("z", "x", "B", "C", "dt")
TOLERANCE = 1e-5


def start(world_size: int, directory: Path, *more: object, iters: int = 6) -> Ranks:
    return train(
        world_size, directory, *more, model=HYBRID_MODEL, iters=iters, script=HYBRID_SCRIPT
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid base that one step of full training saved, on one rank."""
    directory = tmp_path_factory.mktemp("hybrid") / "base"
    start(1, directory, "--no-save-optim", iters=1).succeed()
    return directory


class Trained:
    """Six iterations on two ranks that saved the third and the last."""

    def __init__(self, base: Path, directory: Path, layout: str, *more: str) -> None:
        self.directory, self.flags = directory, [*LORA, "--pretrained-checkpoint", base, *more]
        self.losses = start(2, directory, *self.flags, *flags(layout)).succeed().losses()

    def check_resumed(self, target: Path, layout: str, world_size: int) -> None:
        """Go on from the third iteration on another layout, and compare."""
        back_to(self.directory, target, 3)
        losses = start(world_size, target, *self.flags, *flags(layout)).succeed().losses()
        # NOTE: Megatron logs the mean of the first two iterations after a start as the second's.
        for iteration in (4, 6):
            assert losses[iteration] == pytest.approx(self.losses[iteration], rel=TOLERANCE)
        distances = call(distances_of_parts, self.directory, target)
        assert len(distances) == 2 * len(PARTS)
        assert max(distances.values()) < 1e-3, distances


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(base, tmp_path_factory.mktemp("trained") / "run", "tp2 sp")


def test_a_hybrid_run_goes_on_in_pipeline_stages(trained: Trained, tmp_path: Path) -> None:
    # One of them has no experts, and nothing for their optimizer to load.
    trained.check_resumed(tmp_path / "run", "pp2", 2)


def test_its_distributed_optimizer_goes_on_in_another_layout(base: Path, tmp_path: Path) -> None:
    trained = Trained(base, tmp_path / "run", "tp2 sp do")
    trained.check_resumed(tmp_path / "data", "do", 2)


def test_a_stage_without_experts_resumes_in_bf16(base: Path, tmp_path: Path) -> None:
    trained = Trained(base, tmp_path / "run", "pp2", "--bf16")
    trained.check_resumed(tmp_path / "again", "pp2", 2)


def distances_of_parts(one: Path, other: Path) -> dict[str, float]:
    """Return how far the parts of an in_proj's lora_B, and their first moments, are apart."""
    first, second = read_all(one, 6), read_all(other, 6)
    keys = [f"{IN_PROJ}.{part}" for part in PARTS]
    keys += [f"optimizer.state.exp_avg.{key}" for key in keys]
    return {key: float((first[key] - second[key]).norm() / first[key].norm()) for key in keys}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--export-hf", "adapter"], "whose layer 0 is Mamba (M), which Nemotron-H alone has"),
        (
            ["--lr", "auto"],
            "lr is auto, but hybrid_layer_pattern is 'M*-E', whose layer 0 is Mamba",
        ),
        (["--lora-targets", "attn", "eh_proj"], "['eh_proj'] match no module of this model"),
    ],
    ids=["export", "lr auto", "targets"],
)
def test_what_a_hybrid_run_cannot_do_is_refused(
    tmp_path: Path, more: list[str], message: str
) -> None:
    text = start(1, tmp_path / "run", *LORA, *more, iters=1).fail()
    assert message in text


def test_an_adapter_of_a_hybrid_model_is_not_exported(trained: Trained) -> None:
    text = call(_error_of_reading, trained.directory)
    assert "hybrid_layer_pattern is 'M*-E', whose layer 0 is Mamba (M), which Nemotron-H" in text


def _error_of_reading(checkpoint: Path) -> str:
    from megalora.hf.one_process import read_adapter

    with pytest.raises(ValueError, match="hybrid") as error:
        read_adapter(checkpoint)
    return str(error.value)


def test_layers_that_an_older_megalora_numbered_are_not_taken_for_others(trained: Trained) -> None:
    text = call(_error_of_reading_as_older, trained.directory)
    assert "has names of the hybrid_layer_pattern '*-*-', as an older megalora gave them" in text


def _error_of_reading_as_older(checkpoint: Path) -> str:
    from megalora.hf import one_process

    with one_process.one_process():
        tensors, config, facts = one_process.read_adapter_checkpoint(checkpoint)
    older = tensors, config, replace(facts, hybrid_layer_pattern="*-*-")
    with mock.patch.object(one_process, "read_adapter_checkpoint", return_value=older):
        return _error_of_reading(checkpoint)


def test_the_example_trains_a_hybrid_unless_it_packs(tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text(json.dumps({"text": "What is said three times is true. " * 40}) + "\n")
    given = [word for word in HYBRID_MODEL if word not in ("--vocab-size", "255")]
    given += [*TRAIN, *LORA, "--byte-tokenizer", "--dataset", str(data), "--train-iters", "4"]
    error = run_example(given, tmp_path / "packed").fail()
    assert "'M*-E' with packed examples" in error
    losses = run_example([*given, "--no-packing"], tmp_path / "apart").succeed().losses()
    assert losses[4] < losses[1] - 0.1


def run_example(given: list[str], logs: Path) -> Ranks:
    return Ranks(1, given, logs, script=EXAMPLE, by_megalora=False)


def test_a_builder_without_hooks_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "without_hooks.py"
    script.write_text(WITHOUT_HOOKS.format(folder=SCRIPT.parent))
    text = train(1, tmp_path / "run", *LORA, script=script, iters=1).fail()
    assert "this script's model was built without its pre_wrap_hooks" in text


WITHOUT_HOOKS = """
import runpy, sys
from megatron.training.models import gpt
gpt.compose_hooks = lambda hooks: lambda chunks: chunks
sys.path.insert(0, "{folder}")
runpy.run_path("{folder}/pretrain_tiny.py", run_name="__main__")
"""
