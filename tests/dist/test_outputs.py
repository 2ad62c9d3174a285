"""What could not be written after training is known, on every rank, when adapters are attached."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megalora.builder import apply_lora
from megalora.checkpoint.state import gather_adapters, whole_shapes
from megalora.hf.exchange import check_export
from megalora.training.outputs import check_outputs
from tests.dist.support.cases import EP2, KINDS, TP2_SP
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import VOCAB_SIZE, build_model
from tests.dist.support.parity import lora_config

PP2 = Layout(pp=2)


def adapted(layout: Layout, kind: str, **lora: Any) -> list[Any]:
    model = {**KINDS[kind].model, "num_layers": 2}
    return apply_lora(build_model(layout, **model), lora_config(kind, **lora))


def check(chunks: list[Any], kind: str, **lora: Any) -> None:
    config = lora_config(kind, **lora)
    assert check_export(chunks, config=config, vocab_size=VOCAB_SIZE, hf_model=None) == []


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
    ("kind", "targets"),
    [("multi-token prediction", ("eh_proj",)), ("latent attention", ("linear_q_down_proj",))],
)
@over(PP2)
def test_what_has_no_hugging_face_name_is_refused(
    layout: Layout, kind: str, targets: tuple[str, ...]
) -> None:
    with model_parallel(layout):
        config, chunks = lora_config(kind, targets=targets), adapted(layout, kind, targets=targets)
        with pytest.raises(ValueError, match=f"{targets[0]} has no adapter in Hugging Face"):
            check_export(chunks, config=config, vocab_size=VOCAB_SIZE, hf_model=None)


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


@over(PP2)
def test_an_output_below_a_file_is_refused(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    args = argparse.Namespace(export_hf=None, save_merged=str(tmp_path / "file" / "merged"))
    with model_parallel(layout):
        chunks = adapted(layout, "dense")
        with pytest.raises(ValueError, match="file is a file: give another directory"):
            check_outputs(chunks, args, lora_config("dense"))
