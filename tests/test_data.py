"""Datasets: where rows come from, what they hold, how they are split, and every bad input."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from megalora.data import (
    ByteTokenizer,
    add_data_args,
    attention_format,
    build_datasets,
    check_data_args,
    check_dataset,
    tokenizer_from_args,
)
from megalora.data.rows import load_rows

TOKENIZER = ByteTokenizer()
ROWS = [{"prompt": f"Count to {k}: ", "completion": f"{k} it is."} for k in range(40)]


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def jsonl(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "rows.jsonl", ROWS)


def texts_of(dataset) -> list[str]:
    return [TOKENIZER.detokenize(dataset[i]["tokens"].tolist()) for i in range(len(dataset.rows))]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "folder"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, jsonl: str, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind == "parquet":
        Dataset.from_list(ROWS).to_parquet(path)
    elif kind == "folder":
        path = tmp_path / "folder"
        path.mkdir()
        write_jsonl(path / "b.jsonl", ROWS[20:])
        write_jsonl(path / "a.jsonl", ROWS[:20])
    else:
        path = Path(jsonl)
    assert list(load_rows(str(path))) == ROWS


def test_a_split_can_be_a_slice(jsonl: str) -> None:
    assert list(load_rows(jsonl, "train[10:12]")) == ROWS[10:12]


def test_chat_rows_are_preferred_and_encoded(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Ping"}, {"role": "assistant", "content": "Pong"}]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"messages": chat, "text": "no"}] * 3)
    train, _, _ = build_datasets(path, TOKENIZER, 64, num_samples=(1, 0, 0))
    assert train is not None
    sample = train[0]
    trained = sample["labels"][sample["loss_mask"].bool()].tolist()
    assert trained == [*b"Pong", TOKENIZER.eos] * 3


def test_long_text_goes_on_in_the_next_rows_and_every_token_is_predicted_once(
    tmp_path: Path,
) -> None:
    text = "".join(chr(97 + k % 26) for k in range(100))
    path = write_jsonl(tmp_path / "text.jsonl", [{"text": text}])
    train, _, _ = build_datasets(path, TOKENIZER, 16, num_samples=(None, 0, 0))
    assert train is not None
    samples = sorted((train[i] for i in range(len(train))), key=lambda s: int(s["tokens"][0]))
    predicted = [int(t) for s in samples for t in s["labels"][s["loss_mask"].bool()]]
    assert sorted(predicted) == sorted([*text.encode(), TOKENIZER.eos])
    assert len(train.rows) == 7


def test_a_share_of_the_rows_is_held_out_where_there_is_no_validation(jsonl: str) -> None:
    train, valid, test = build_datasets(jsonl, TOKENIZER, 64, valid_fraction=0.25, packing=False)
    assert train is not None
    assert valid is not None
    assert test is None
    assert (len(train), len(valid)) == (30, 10)
    assert not set(texts_of(train)) & set(texts_of(valid))
    assert set(texts_of(train) + texts_of(valid)) == {r["prompt"] + r["completion"] for r in ROWS}


def test_no_row_is_held_out_where_nothing_is_validated(jsonl: str) -> None:
    train, valid, _ = build_datasets(
        jsonl, TOKENIZER, 64, packing=False, num_samples=(None, 0, None)
    )
    assert train is not None
    assert len(train) == 40
    assert valid is None


def test_named_splits_are_taken(jsonl: str) -> None:
    train, valid, test = build_datasets(
        jsonl,
        TOKENIZER,
        64,
        train_split="train[:30]",
        valid_split="train[30:36]",
        test_split="train[36:]",
        packing=False,
    )
    assert [len(d) for d in (train, valid, test) if d is not None] == [30, 6, 4]


def test_embedded_corpora_bring_their_own_validation() -> None:
    lines: list[str] = []
    train, valid, _ = build_datasets(
        "stdlib-docstrings", TOKENIZER, 256, num_samples=(500, 8, 0), log=lines.append
    )
    assert train is not None
    assert valid is not None
    assert (len(train), len(valid)) == (500, 8)
    assert [line.split(" data:")[0] for line in lines] == ["train", "valid"]
    assert train.fill > 0.85


def test_packed_and_unpacked_train_on_the_same_tokens(jsonl: str) -> None:
    def trained(packing: bool) -> list[tuple[int, int]]:
        train, _, _ = build_datasets(
            jsonl, TOKENIZER, 128, packing=packing, num_samples=(None, 0, 0)
        )
        assert train is not None
        samples = [train[i] for i in range(len(train))]
        pairs = [
            (int(p), int(t))
            for s in samples
            for p, t in zip(
                s["position_ids"][s["loss_mask"] > 0], s["labels"][s["loss_mask"] > 0], strict=True
            )
        ]
        return sorted(pairs)

    assert trained(True) == trained(False)


def test_cut_and_dropped_rows_are_counted_and_said(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b" * 50},
        {"prompt": "a" * 50, "completion": "b"},
    ]
    lines: list[str] = []
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    build_datasets(path, TOKENIZER, 16, num_samples=(None, 0, 0), log=lines.append)
    assert "2 examples" in lines[0]
    assert "2 cut to --seq-length; 1 dropped" in lines[0]


# --- bad input ---


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


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(ValueError, match=r"x.jsonl is empty: give a file with rows"):
        build(str(tmp_path / "x.jsonl"))


def test_an_empty_split_is_refused(tmp_path: Path, jsonl: str) -> None:
    Dataset.from_dict({"text": []}).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"dataset_split 'train' .*no data.*: give .* a split"):
        build(str(tmp_path / "x.parquet"))
    with pytest.raises(
        ValueError, match=r"dataset_split 'train\[:0\]' .*no data.*: give .* a split"
    ):
        build(jsonl, train_split="train[:0]")


def test_a_split_that_is_not_there_is_refused(jsonl: str) -> None:
    with pytest.raises(ValueError, match=r"dataset_split 'gold' cannot be read .*Unknown split"):
        build(jsonl, valid_split="gold")


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{broken\n")
    with pytest.raises(ValueError, match=r"x.jsonl .* cannot be read"):
        build(str(tmp_path / "x.jsonl"))


def test_a_folder_of_mixed_or_no_files_is_refused(tmp_path: Path, jsonl: str) -> None:
    (tmp_path / "more.parquet").touch()
    with pytest.raises(ValueError, match=r"is not files of one kind: give \.json, \.jsonl"):
        build(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"is not files of one kind"):
        build(str(tmp_path / "empty"))


def test_a_row_that_breaks_its_columns_promise_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "fine"}, {"text": None}])
    with pytest.raises(ValueError, match=r"row 1 does not hold the text it should"):
        build(path, num_samples=(None, 0, 0))


def test_too_few_rows_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", ROWS[:1])
    with pytest.raises(ValueError, match=r"1 rows, too few .*--dataset-valid-split"):
        build(path)


def test_a_held_out_share_of_nothing_is_refused(jsonl: str) -> None:
    with pytest.raises(ValueError, match=r"dataset_valid_fraction 0 is not between 0 and 1"):
        build(jsonl, valid_fraction=0)


def test_the_check_finds_what_building_would_find(tmp_path: Path, jsonl: str) -> None:
    check_dataset(jsonl, TOKENIZER, 64)
    masked = write_jsonl(tmp_path / "y.jsonl", [{"prompt": "a" * 100, "completion": "b"}])
    with pytest.raises(ValueError, match=r"no token to train on"):
        check_dataset(masked, TOKENIZER, 64)
    with pytest.raises(ValueError, match=r"cannot be read"):
        check_dataset(jsonl, TOKENIZER, 64, valid_split="gold")


# --- flags ---


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer-type")
    return add_data_args(parser)


def test_megatron_is_given_a_vocabulary_for_the_byte_tokenizer() -> None:
    args = parser().parse_args(["--byte-tokenizer"])
    assert (args.tokenizer_type, args.vocab_size) == ("NullTokenizer", 262)
    assert isinstance(tokenizer_from_args(args), ByteTokenizer)


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
    check_data_args(args)
    args.rank = 0
    with pytest.raises(ValueError, match="/gone is not there"):
        check_data_args(args)


def test_without_packing_nothing_must_be_kept_apart() -> None:
    args = argparse.Namespace(dataset="any", packing=False)
    assert attention_format(args) == "padded"


def test_no_data_at_all_is_refused() -> None:
    args = parser().parse_args([])
    for name in ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path"):
        setattr(args, name, None)
    args.mock_data = args.reset_attention_mask = False
    with pytest.raises(ValueError, match=r"dataset is not given: set --dataset, or .*--data-path"):
        check_data_args(args)


def test_held_out_rows_depend_on_the_seed_only(jsonl: str) -> None:
    def held_out(seed: int) -> list[str]:
        _, valid, _ = build_datasets(
            jsonl, TOKENIZER, 64, valid_fraction=0.25, packing=False, seed=seed
        )
        return texts_of(valid)

    assert held_out(1) == held_out(1)
    assert held_out(1) != held_out(2)


def test_ids_fit_the_tokenizers_vocabulary(jsonl: str) -> None:
    train, _, _ = build_datasets(jsonl, TOKENIZER, 64, num_samples=(None, 0, 0))
    assert train is not None
    assert train.examples.ids.dtype == np.int32
    assert max(int(train[0][key].max()) for key in ("tokens", "labels")) < TOKENIZER.vocab_size
