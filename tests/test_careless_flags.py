"""Flags that would write over what a run reads, or mix its checkpoints with another's: refused."""

import argparse
import os
from pathlib import Path

import pytest

from megalora.training.flags import check_load, check_output_args, check_save
from tests.support.forked import call

NOT_OURS = pytest.mark.bad_input("a directory that is not ours")
FLAGS = (
    *("save", "load", "pretrained_checkpoint", "hf_model", "lora_load"),
    *("export_hf", "save_merged"),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work beside a base, a run with a checkpoint, and another directory."""
    for name in ("base", "run/iter_0000003", "empty", "above/below"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "base" / "latest_checkpointed_iteration.txt").write_text("release")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("3")
    (tmp_path / "link").symlink_to("base")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def given(text: str) -> argparse.Namespace:
    """Return flags written short, as in `save=out load=out`."""
    values = dict(word.split("=") for word in text.split())
    return argparse.Namespace(**{**dict.fromkeys(FLAGS), **values})


REFUSED = {
    "save=base pretrained_checkpoint=base": "save 'base' is also pretrained_checkpoint 'base'",
    "save=base load=base pretrained_checkpoint=base": "is also pretrained_checkpoint",
    "save=link pretrained_checkpoint=base": "save 'link' is also pretrained_checkpoint 'base'",
    "save=above/../base pretrained_checkpoint=base": "is also pretrained_checkpoint",
    "save=base/new pretrained_checkpoint=link": "is inside pretrained_checkpoint 'link'",
    "save=base hf_model=base": "is also hf_model",
    "save=base/new hf_model=base": "is inside hf_model",
    "save=empty lora_load=empty": "is also lora_load",
    "save=above/below lora_load=above": "is inside lora_load",
    "save=above lora_load=above/below": "is above lora_load",
    "save=run": "save 'run' holds checkpoints already (the newest is 3)",
    "save=run load=empty": "add --load run to go on from them, or give another --save",
    "save=run lora_load=empty": "holds checkpoints already",
    "save=base": "holds checkpoints already (the newest is release)",
}


@pytest.mark.parametrize("flags", REFUSED)
@NOT_OURS
def test_a_save_that_would_harm_something_is_refused(place: Path, flags: str) -> None:
    with pytest.raises(ValueError, match="save") as refused:
        check_save(given(flags))
    assert REFUSED[flags] in str(refused.value)


@pytest.mark.parametrize(
    "flags",
    [
        "save=run load=run",
        "save=run load=above/../run",
        "save=run load=run lora_load=empty pretrained_checkpoint=base",
        "save=new load=new",
        "save=new",
        "save=empty load=run",
        "save=. pretrained_checkpoint=base load=.",
        "load=run",
    ],
)
def test_ordinary_saves_are_not(place: Path, flags: str) -> None:
    check_save(given(flags))


@pytest.mark.parametrize(
    ("file", "flag"), [("adapter_config.json", "--lora-load"), ("config.json", "--hf-model")]
)
@NOT_OURS
def test_a_directory_of_hugging_face_is_no_empty_load(place: Path, file: str, flag: str) -> None:
    for directory in ("empty", "run"):
        (place / directory / file).touch()
    with pytest.raises(ValueError, match=f"load 'empty' has {file} .*: give it by {flag}"):
        check_load(given("load=empty"))
    check_load(given("load=run"))
    check_load(given("load=new"))


@NOT_OURS
def test_a_base_that_is_no_checkpoint_is_refused_before_the_model_is_built(place: Path) -> None:
    (place / "base/release").mkdir()
    for flags in ("pretrained_checkpoint=base", "pretrained_checkpoint=empty load=run"):
        check_load(given(flags))
    check_load(given("pretrained_checkpoint=elsewhere load=new"))
    with pytest.raises(ValueError, match=r"has no latest_checkpointed_.*: give the dir"):
        check_load(given("pretrained_checkpoint=empty load=new"))
    (place / "empty/config.json").touch()
    with pytest.raises(ValueError, match=r"'empty' has config.json .*: give it by --hf-model"):
        check_load(given("pretrained_checkpoint=empty"))


OUTPUTS = {
    "export_hf=run": "holds iter_0000003, latest_checkpointed_iteration.txt, which megalora did",
    "export_hf=base pretrained_checkpoint=base": "is also pretrained_checkpoint",
    "export_hf=empty/a hf_model=empty": "is inside hf_model",
    "export_hf=above lora_load=above/below": "is above lora_load",
    "export_hf=. save=new": "is the working directory",
    "export_hf=empty save=empty": "export_hf 'empty' is the directory of save too",
    "export_hf=new save=new/run": "is the directory of save too, or above it",
    "save_merged=empty load=empty": "save_merged 'empty' is the directory of load too",
    "save_merged=empty export_hf=empty": "is also",
    "save_merged=new export_hf=new/adapter": "is inside save_merged",
    "save_merged=base": "holds latest_checkpointed_iteration.txt, which megalora did not write",
}


@pytest.mark.parametrize("flags", OUTPUTS)
@NOT_OURS
def test_an_output_over_something_else_is_refused_before_training(place: Path, flags: str) -> None:
    with pytest.raises(ValueError, match=r"export_hf|save_merged") as refused:
        check_output_args(given(flags))
    assert OUTPUTS[flags] in str(refused.value)


@pytest.mark.parametrize(
    "flags", ["export_hf=run/hf save=run load=run", "save_merged=new export_hf=new2", "save=run"]
)
def test_ordinary_outputs_are_not(place: Path, flags: str) -> None:
    check_output_args(given(flags))


@NOT_OURS
def test_only_files_of_a_checkpoint_are_removed_before_it_is_saved_anew(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("3")
    assert call(files_after_removing, tmp_path) == {
        3: ["__0_0.distcp"],
        6: ["notes.txt", "plots"],
    }


def files_after_removing(run: Path) -> dict[int, list[str]]:
    """Return what stays of a finished checkpoint, and of one whose save was killed."""
    # It imports Megatron, which this process has not.
    from megalora.checkpoint.save import _remove_stale

    for iteration, names in {3: ["__0_0.distcp"], 6: ["__0_0.distcp", "common.pt"]}.items():
        directory = run / f"iter_{iteration:07d}"
        directory.mkdir(exist_ok=True)
        for name in names:
            (directory / name).touch()
    (directory / "notes.txt").touch()
    (directory / "plots").mkdir()
    found = {}
    for iteration in (3, 6):
        _remove_stale(run, iteration)
        found[iteration] = sorted(os.listdir(run / f"iter_{iteration:07d}"))
    return found
