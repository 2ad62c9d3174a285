"""What could not be written after training is known, on every rank, when adapters are attached."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megalora.builder import apply_lora
from megalora.checkpoint.gather import gather_adapters, whole_shapes
from megalora.checkpoint.ranks import on_all_ranks
from megalora.hf.exchange import check_export
from megalora.training import outputs
from megalora.training.outputs import check_outputs, write_outputs
from tests.dist.support.cases import EP2, KINDS, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import VOCAB_SIZE, build_model
from tests.dist.support.parity import lora_config
from tests.dist.support.resuming import shared_directory

PP2 = Layout(pp=2)


def adapted(layout: Layout, kind: str, **lora: Any) -> list[Any]:
    model = {**KINDS[kind].model, "num_layers": 2}
    return apply_lora(build_model(layout, **model), lora_config(kind, **lora))


def check(chunks: list[Any], kind: str, **lora: Any) -> None:
    config = lora_config(kind, **lora)
    checked = check_export(chunks, config=config, vocab_size=VOCAB_SIZE, hf_model=None)
    assert checked == ("peft", [])


@pytest.mark.parametrize("kind", ["shared experts", "shared-outer experts"])
@over(PP2, TP2_SP, EP2)
def test_shapes_are_known_without_gathering(layout: Layout, kind: str) -> None:
    with model_parallel(layout):
        chunks = adapted(layout, kind, targets=("all",))
        shapes = whole_shapes(chunks)
        gathered = {name: list(x.shape) for name, x in gather_adapters(chunks).items()}
        assert dist.get_rank() != 0 or shapes == gathered
        assert shapes
        check(chunks, kind, targets=("all",))


# The first is in the last stage only.
@pytest.mark.parametrize(
    ("kind", "target", "why"),
    [
        (
            "multi-token prediction",
            "eh_proj",
            "has no adapter in .*, which leave out what predicts one token more",
        ),
        ("latent attention", "linear_q_down_proj", "has no adapter in Hugging Face"),
    ],
)
@over(PP2)
def test_what_has_no_hugging_face_name_is_refused(
    layout: Layout, kind: str, target: str, why: str
) -> None:
    targets = (target,)
    with model_parallel(layout):
        config, chunks = lora_config(kind, targets=targets), adapted(layout, kind, targets=targets)
        with pytest.raises(ValueError, match=f"{target} {why}"):
            check_export(chunks, config=config, vocab_size=VOCAB_SIZE, hf_model=None)


@over(EP2)
def test_only_shared_experts_are_promised_in_the_format_of_tinker(layout: Layout) -> None:
    options: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hf_model": None, "format": "tinker"}
    with model_parallel(layout):
        outer = adapted(layout, "shared-outer experts")
        check_export(outer, config=lora_config("shared-outer experts"), **options)
        chunks = adapted(layout, "shared experts")
        with pytest.raises(ValueError, match="add --lora-expert-mode shared_outer"):
            check_export(chunks, config=lora_config("shared experts"), **options)


@pytest.mark.bad_input("a malformed file")
@over(PP2)
def test_what_a_server_refuses_is_refused_on_all_stages(layout: Layout, tmp_path: Path) -> None:
    base = shared_directory(tmp_path)
    on_all_ranks(lambda: (base / "config.json").write_text('{"model_type": "qwen2"}'), only=0)
    args = argparse.Namespace(
        **{"export_hf": str(tmp_path / "adapter"), "export_for": "vllm", "export_format": None},
        **{"save_merged": None, "hf_model": str(base), "vocab_size": VOCAB_SIZE},
    )
    with model_parallel(layout):
        chunks = adapted(layout, "dense", targets=("all",))
        with pytest.raises(
            ValueError, match=r"Qwen2ForCausalLM takes no adapter of lm_head: train"
        ):
            check_outputs(chunks, args, lora_config("dense", targets=("all",)))
        chunks = adapted(layout, "dense", targets=("attn", "mlp"))
        check_outputs(chunks, args, lora_config("dense", targets=("attn", "mlp")))


@over(PP2)
def test_an_impossible_merge_is_refused_on_all_stages(layout: Layout, tmp_path: Path) -> None:
    args = argparse.Namespace(export_hf=None, save_merged=str(tmp_path / "merged"))
    with model_parallel(layout):
        config = lora_config("tied embeddings")
        chunks = adapted(layout, "tied embeddings")
        with pytest.raises(ValueError, match="tied"):
            check_outputs(chunks, args, config)
        chunks = adapted(layout, "dense")
        check_outputs(chunks, args, lora_config("dense"))


def write_merged(directory: Path) -> None:
    args = argparse.Namespace(export_hf=None, save_merged=str(directory))
    write_outputs([], args, lora_config("dense"))


@pytest.mark.bad_input("a directory that is not ours")
@over(PP2)
def test_a_merged_checkpoint_replaces_only_an_earlier_one(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = shared_directory(tmp_path) / "merged"
    content = "old"

    def save(_: object, filling: Path) -> None:
        assert not merged.exists() or content == "new"
        (filling / f"{dist.get_rank()}.distcp").write_text(content)
        dist.barrier()

    monkeypatch.setattr(outputs, "save_merged", save)
    with model_parallel(layout):
        write_merged(merged)
        content = "new"
        write_merged(merged)
        texts = {path.name: path.read_text() for path in merged.glob("*.distcp")}
        assert texts == {"0.distcp": "new", "1.distcp": "new"}
        on_all_ranks(lambda: (merged / "notes.txt").write_text("mine"), only=0)
        with pytest.raises(
            ValueError, match=r"save_merged .* holds notes\.txt, which megalora did"
        ):
            write_merged(merged)
        assert (merged / "notes.txt").read_text() == "mine"
        assert list(merged.parent.iterdir()) == [merged]


@pytest.mark.bad_input("a write that fails")
@over(PP2)
def test_a_merged_checkpoint_that_cannot_be_written_leaves_nothing(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = shared_directory(tmp_path) / "merged"

    def fail(_: object, filling: Path) -> None:
        def write() -> None:
            (filling / "half").touch()
            raise OSError("disk full")

        on_all_ranks(write, only=1)

    monkeypatch.setattr(outputs, "save_merged", fail)
    with model_parallel(layout):
        with pytest.raises(ValueError, match="disk full"):
            write_merged(merged)
        dist.barrier()
        assert list(merged.parent.iterdir()) == []


@pytest.mark.bad_input("a directory that is not ours")
@over(PP2)
def test_an_output_below_a_file_is_refused(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    args = argparse.Namespace(export_hf=None, save_merged=str(tmp_path / "file" / "merged"))
    with model_parallel(layout):
        chunks = adapted(layout, "dense")
        with pytest.raises(ValueError, match="file is a file: give another directory"):
            check_outputs(chunks, args, lora_config("dense"))
