"""Data in a run: Megatron's own parser, tokenizers and datasets, and what cannot be trained on."""

import argparse
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers import MegatronTokenizer
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import global_vars
from megatron.training.arguments import parse_args

from megalora.data import ByteTokenizer, add_data_args, attention_format, batch
from megalora.data.arguments import check_data_args, tokenizer_from_args
from megalora.training import patches
from tests.dist.support.layouts import Layout, model_parallel
from tests.support.forgery import Payload


@pytest.mark.world_1
def test_megatrons_own_parser_and_tokenizers_take_the_byte_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = "--dataset stdlib-docstrings --byte-tokenizer --no-packing"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    args: Any = parse_args(extra_args_provider=add_data_args)
    args.rank = 0
    assert build_tokenizer(args).vocab_size == ByteTokenizer.vocab_size
    assert build_tokenizer(args).eod == ByteTokenizer.eos
    assert args.padded_vocab_size == 384
    assert isinstance(tokenizer_from_args(args), ByteTokenizer)
    assert (args.dataset, args.packing) == ("stdlib-docstrings", False)


@pytest.mark.world_1
def test_a_run_without_a_tokenizer_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.install(patches.PARSING)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    remedies = {
        add_data_args: ", or --byte-tokenizer",
        lambda parser: parser: "--tokenizer-model DIR$",
    }
    for add, remedy in remedies.items():
        with pytest.raises(ValueError, match=rf"tokenizer_type is not given: set .*{remedy}"):
            global_vars.build_tokenizer(parse_args(extra_args_provider=add))


@pytest.mark.world_1
def test_the_attention_format_follows_what_the_attention_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = argparse.Namespace(
        dataset="any",
        packing=True,
        transformer_impl="transformer_engine",
        pipeline_model_parallel_size=2,
        context_parallel_size=1,
        micro_batch_size=2,
        multi_latent_attention=False,
        window_size=None,
    )
    assert attention_format(args) == "mask"  # on the CPU
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", True)
    monkeypatch.setattr("megalora.cpu.installed", lambda: False)
    with pytest.raises(ValueError, match="micro_batch_size 2 with packing and 2 pipeline stages"):
        attention_format(args)
    args.micro_batch_size = 1
    assert attention_format(args) == "thd"
    args.hybrid_layer_pattern = "M*"
    assert attention_format(args) == "thd"
    args.transformer_impl = "local"
    with pytest.raises(ValueError, match=r"'M\*' with packed examples.*set --no-packing"):
        attention_format(args)
    args.hybrid_layer_pattern = None
    assert attention_format(args) == "thd"
    args.window_size = (8, 0)
    assert attention_format(args) == "thd"
    args.multi_latent_attention = True
    assert attention_format(args) == "mask"


@pytest.mark.world_1
def test_masks_that_no_memory_holds_are_refused() -> None:
    args = argparse.Namespace(
        dataset="/gone",
        dataloader_type="single",
        rank=1,
        packing=True,
        transformer_impl="local",
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        micro_batch_size=1,
        seq_length=10**6,
        num_layers=1,
        recompute_granularity=None,
        multi_latent_attention=False,
        window_size=None,
    )
    check_data_args(args)  # boundaries are enough
    args.multi_latent_attention = True
    with pytest.raises(ValueError, match=r"seq_length 1000000 needs 4657 GiB of attention masks"):
        check_data_args(args)
    args.packing = False
    check_data_args(args)
    args.window_size = (8, 0)
    with pytest.raises(ValueError, match=r"needs 4657 GiB .*: lower --seq-length$"):
        check_data_args(args)
    args.window_size = None
    args.context_parallel_size = 2
    with pytest.raises(
        ValueError, match=r"needs 2328 GiB .*--context-parallel-size 1 and --no-pack"
    ):
        check_data_args(args)


@pytest.mark.world_1
def test_mamba_is_told_which_example_a_token_is_of() -> None:
    packed = batch.packed_params(torch.tensor([0, 3, 4, 6]), None)
    assert packed.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2]]


@pytest.fixture
def own_args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Flags of a data set of Megatron's own."""
    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.int32)
    for start in range(40):
        builder.add_document(torch.tensor([*range(start, start + 10), 99]), [11])
    builder.finalize(str(tmp_path / "text.idx"))
    flags = f"--data-path {tmp_path / 'text'} --split 80,10,10 --seq-length 32 --seed 1"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), "--reset-attention-mask"])
    args: Any = parse_args(extra_args_provider=add_data_args)
    megatron_tokenizer: Any = MegatronTokenizer
    tokenizer = megatron_tokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=128, eod_id=99, pad_id=0
    )
    monkeypatch.setattr(batch, "get_args", lambda: args)
    monkeypatch.setattr(batch, "get_tokenizer", lambda: tokenizer)
    return args


@pytest.mark.world_1
def test_megatrons_own_datasets_keep_working(own_args: Any) -> None:
    with model_parallel(Layout()):
        check_data_args(own_args)
        train, valid, _ = batch.datasets_provider([8, 2, 0])
    assert (len(train) >= 8, train.split, valid.split) == (True, Split.train, Split.valid)
    sample = train[0]
    assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()
    bounds = sample["cu_seqlens"].unique().tolist()
    assert [int(sample["tokens"][end - 1]) for end in bounds[1:-1]] == [99] * (len(bounds) - 2)
    assert len(bounds) > 3


def array_of(payload: Payload, path: Path) -> None:
    """Write an array of objects, as numpy does."""
    np.save(path, np.array([payload], dtype=object), allow_pickle=True)


def plain(payload: Payload, path: Path) -> None:
    """Write a pickle that is no array."""
    path.write_bytes(pickle.dumps(payload))


@pytest.mark.world_1
@pytest.mark.bad_input("code in a file")
@pytest.mark.parametrize("write", [array_of, plain], ids=lambda write: write.__name__)
def test_the_cache_of_megatrons_own_datasets_cannot_run_code(
    write: Callable[[Payload, Path], None], own_args: Any, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    with model_parallel(Layout()):
        batch.datasets_provider([8, 2, 0])
        indices = sorted(tmp_path.rglob("*-train-*_index.npy"))
        assert len(indices) == 3
        for path in indices:
            kept = path.read_bytes()
            write(Payload(marker), path)
            np.load(path, allow_pickle=True)
            assert marker.exists()
            marker.unlink()
            with pytest.raises(ValueError, match=r"cache|memory-mapped"):
                batch.datasets_provider([8, 2, 0])
            assert not marker.exists()
            path.write_bytes(kept)
