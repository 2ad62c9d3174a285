"""Bad datasets and flags: every one ends in a sentence that names what is wrong, and where."""

import argparse
import json
from pathlib import Path

import pytest
from datasets import Dataset

from megalora.data import (
    ByteTokenizer,
    add_data_args,
    attention_format,
    build_datasets,
    check_data_args,
    check_dataset,
    datasets_from_args,
    tokenizer_from_args,
)
from megalora.data.rows import load_rows
from tests.test_data import ANSWER, ROWS, TOKENIZER, write_jsonl

pytestmark = pytest.mark.usefixtures("datasets_cache")


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def build(dataset: str, seq_length: int = 64, **options) -> None:
    build_datasets(dataset, TOKENIZER, seq_length, **options)


def test_columns_that_are_of_no_use_are_listed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "a", "prompt": "b"}])
    with pytest.raises(ValueError, match=r"columns \['question', 'prompt'\], none .* rename them"):
        build(path, num_samples=(None, 0, 0))


def test_answers_that_are_all_masked_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "a" * 100, "completion": "b"}] * 3)
    with pytest.raises(ValueError, match=r"no token to train on in any of its 3 .*--seq-length"):
        build(path, num_samples=(None, 0, 0))
    build(path, 128, num_samples=(None, 0, 0))


def test_a_sequence_longer_than_the_model_is_refused(jsonl: str) -> None:
    with pytest.raises(ValueError, match=r"seq_length 128 is longer than the model's 64 .*lower"):
        build(jsonl, 128, max_seq_length=64)


def test_a_sequence_length_that_is_not_positive_is_refused(jsonl: str) -> None:
    with pytest.raises(ValueError, match=r"seq_length 0 is not positive"):
        build(jsonl, 0)


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "/gone"])
def test_a_missing_file_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"is not there: check the path"):
        build(name)


def test_a_name_that_the_hub_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dataset no-one/nothing .* cannot be read .*hub name"):
        build("no-one/nothing")


@pytest.mark.bad_input("a malformed file")
def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ValueError, match=r"x.jsonl is empty: give a file with rows"):
        build(str(tmp_path / "x.jsonl"))


def test_an_empty_split_is_refused(tmp_path: Path, jsonl: str) -> None:
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x.parquet is empty: give a file with rows"):
        build(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match=r"dataset_split 'train\[:0\]' .*no rows: give another"):
        build(jsonl, train_split="train[:0]")


def test_a_split_that_is_not_there_is_refused(jsonl: str) -> None:
    with pytest.raises(ValueError, match=r"dataset_split 'gold' cannot be read .*Unknown split"):
        build(jsonl, valid_split="gold")


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("line", [b'{"prompt": ', b"[1]", b'{"text": "\xff"}', b"null"])
def test_a_broken_line_is_named_before_any_model_is_built(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(ValueError, match=r"dataset .*x.jsonl line 3: no JSON object"):
        check_dataset(str(path), TOKENIZER, 64)


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "x.json row 0: a int, no object"),
        ('[{"text": ', "x.json is no list of JSON objects: Expecting value: line 1"),
        ("{", "x.json line 1: no JSON object"),
        ("[]", "x.json is empty"),
    ],
)
def test_a_broken_list_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_dataset(str(tmp_path / "x.json"), TOKENIZER, 64)


@pytest.mark.bad_input("a malformed file")
def test_a_broken_parquet_file_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    (folder / "b.parquet").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"b.parquet is no parquet file: "):
        load_rows(str(folder))


@pytest.mark.bad_input("a malformed file")
def test_rows_of_another_kind_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [ROWS[0], {"messages": ANSWER}])
    with pytest.raises(
        ValueError, match=r"line 2: no `prompt` and no `completion`.*\['messages'\]"
    ):
        check_dataset(path, TOKENIZER, 64)


@pytest.mark.bad_input("a malformed file")
def test_text_that_is_none_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [ROWS[0], {"prompt": "a", "completion": 3}])
    with pytest.raises(ValueError, match=r"line 2: `completion` is 3, not text"):
        check_dataset(path, TOKENIZER, 64)


def test_chats_without_an_assistant_are_refused_as_such(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"messages": [{"role": "user", "content": "q"}]}])
    with pytest.raises(
        ValueError, match=r"any of its 1 .*no chat has .* assistant.*add the answers"
    ):
        check_dataset(path, TOKENIZER, 64)


def test_a_second_dataset_is_refused(jsonl: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--dataset", jsonl, "--dataset", "other.jsonl"])
    assert f"--dataset {jsonl} and other.jsonl: put the files into one" in capsys.readouterr().err


# --- flags ---


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer-type")
    parser.add_argument("--vocab-size", type=int)
    return add_data_args(parser)


def test_megatron_is_given_a_vocabulary_for_the_byte_tokenizer() -> None:
    args = parser().parse_args(["--byte-tokenizer"])
    assert (args.tokenizer_type, args.vocab_size) == ("NullTokenizer", 262)
    assert isinstance(tokenizer_from_args(args), ByteTokenizer)


def test_the_byte_tokenizer_keeps_a_larger_vocabulary_of_the_base() -> None:
    """The flags of --hf-model come first; with fewer rows its weights would not load."""
    args = parser().parse_args(["--vocab-size", "512", "--byte-tokenizer"])
    assert args.vocab_size == 512
    args = parser().parse_args(["--vocab-size", "100", "--byte-tokenizer"])
    assert args.vocab_size == 262


def test_without_the_flag_the_tokenizer_is_megatrons() -> None:
    args = parser().parse_args(["--tokenizer-type", "HuggingFaceTokenizer"])
    assert (args.tokenizer_type, args.byte_tokenizer) == ("HuggingFaceTokenizer", False)


def test_two_tokenizers_are_refused() -> None:
    args = parser().parse_args(["--byte-tokenizer", "--tokenizer-type", "HuggingFaceTokenizer"])
    with pytest.raises(ValueError, match="HuggingFaceTokenizer with --byte-tokenizer is two"):
        tokenizer_from_args(args)


def test_rank_0_alone_checks_the_dataset() -> None:
    args = parser().parse_args(["--dataset", "/gone", "--byte-tokenizer"])
    args.packing, args.seq_length, args.max_position_embeddings, args.rank = False, 8, 8, 1
    args.dataloader_type, args.context_parallel_size, args.window_size = "single", 1, None
    args.full_validation, args.eval_iters = False, 0
    check_data_args(args)
    args.rank = 0
    with pytest.raises(ValueError, match="/gone is not there"):
        check_data_args(args)


def test_a_loader_that_shuffles_by_the_layout_is_refused() -> None:
    args = parser().parse_args(["--dataset", "any", "--no-packing"])
    args.dataloader_type, args.context_parallel_size, args.window_size = "cyclic", 1, None
    with pytest.raises(
        ValueError, match=r"dataloader_type is 'cyclic'.*leave --dataloader-type out"
    ):
        check_data_args(args)


def test_without_packing_nothing_must_be_kept_apart() -> None:
    args = argparse.Namespace(dataset="any", packing=False)
    assert attention_format(args) == "padded"


def test_no_data_at_all_is_refused() -> None:
    args = parser().parse_args([])
    for name in ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path"):
        setattr(args, name, None)
    args.mock_data = args.reset_attention_mask = False
    args.context_parallel_size, args.window_size = 1, None
    with pytest.raises(ValueError, match=r"dataset is not given: set --dataset, or .*--data-path"):
        check_data_args(args)


def test_a_batch_larger_than_the_data_is_said(jsonl: str) -> None:
    args = parser().parse_args(["--dataset", jsonl, "--byte-tokenizer", "--no-packing"])
    args.tokenizer_type, args.seq_length, args.seed = "NullTokenizer", 64, 1
    args.context_parallel_size, args.max_position_embeddings = 1, 64
    for size, num_warnings in ((40, 0), (41, 1)):
        args.global_batch_size = size
        lines: list[str] = []
        datasets_from_args(args, (size, 0, 0), log=lines.append)
        found = [line for line in lines if "fills 40 rows, fewer than global_batch_size 41" in line]
        assert len(found) == num_warnings
