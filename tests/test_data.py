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
    datasets_from_args,
    tokenizer_from_args,
)
from megalora.data.examples import hold_out
from megalora.data.rows import load_rows
from megalora.run_arguments import check_eval_args

TOKENIZER = ByteTokenizer()
ANSWER = [{"role": "assistant", "content": "Pong"}]
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
    assert "2 examples cut to --seq-length, 38 tokens to train on lost in them, 1 of" in lines[0]


# --- what is not trained on is said ---


def warning_of(dataset: str, **options) -> str:
    """Return the one warning that building `dataset` logs, or nothing."""
    lines: list[str] = []
    build_datasets(dataset, TOKENIZER, 64, log=lines.append, **options)
    warnings = [line for line in lines if line.startswith("WARNING")]
    assert len(warnings) < 2
    return "".join(warnings)


def test_columns_and_keys_that_nothing_is_made_of_are_named_once(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Ping", "name": "Al"}, *ANSWER]
    rows = [{"messages": chat, "id": 1}, {"messages": chat, "score": 2, "gone": None}] * 8
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    assert warning_of(path).endswith("chat.jsonl: nothing is made of ['id', 'name', 'score']")
    assert not warning_of(write_jsonl(tmp_path / "plain.jsonl", ROWS))


def test_files_of_a_folder_that_are_not_read_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", ROWS)
    for name in ("b.jsonl.gz", "README.md", ".hidden"):
        (folder / name).touch()
    assert warning_of(str(folder)).endswith("not read: ['b.jsonl.gz', 'more']")


def test_validation_rows_that_are_trained_on_are_counted(jsonl: str) -> None:
    assert "10 of 20 validation rows are trained on too" in warning_of(
        jsonl, train_split="train[:30]", valid_split="train[20:]"
    )
    assert not warning_of(jsonl, train_split="train[:30]", valid_split="train[30:]")


def test_passes_over_the_rows_are_said(jsonl: str) -> None:
    lines: list[str] = []
    options = {"packing": False, "num_samples": (100, 0, 0)}
    build_datasets(jsonl, TOKENIZER, 64, log=lines.append, **options)
    assert "40 rows of 64" in lines[0]
    assert "read 2.5 times" in lines[0]


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Ping"}
    lines: list[str] = []
    rows = [{"messages": [question, *ANSWER]}, {"messages": [question]}]
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    build_datasets(path, TOKENIZER, 64, num_samples=(None, 0, 0), log=lines.append)
    assert "1 examples, " in lines[0]
    assert "1 left out, they have no answer to train on" in lines[0]


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


# --- rows are read as they stand ---


def test_json_rows_have_the_keys_and_the_text_of_their_line(tmp_path: Path) -> None:
    rows = [{"text": "2024-01-01", "meta": {"a": None}}, {"text": "2024-01-02", "meta": {"b": 1}}]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n\n".join(json.dumps(r).encode() for r in rows))
    loaded = load_rows(str(path))
    assert list(loaded) == rows
    assert loaded.where(1) == f"{path} line 3"


def test_keys_that_only_other_rows_of_a_parquet_file_have_are_not_there(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "a": 1}]}, {"messages": [{"role": "user", "b": 2}]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "x.parquet")
    assert [row["messages"] for row in load_rows(str(tmp_path / "x.parquet"))] == [
        row["messages"] for row in rows
    ]


def test_held_out_rows_keep_their_place(jsonl: str) -> None:
    train, valid = hold_out(load_rows(jsonl), 0.25, seed=1)
    for rows in (train, valid):
        for index, row in enumerate(rows):
            assert rows.where(index) == f"{jsonl} line {ROWS.index(row) + 1}"


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
    with pytest.raises(ValueError, match=r"x.parquet is empty: give a file with rows"):
        build(str(tmp_path / "x.parquet"))
    with pytest.raises(ValueError, match=r"dataset_split 'train\[:0\]' .*no rows: give another"):
        build(jsonl, train_split="train[:0]")


def test_a_split_that_is_not_there_is_refused(jsonl: str) -> None:
    with pytest.raises(ValueError, match=r"dataset_split 'gold' cannot be read .*Unknown split"):
        build(jsonl, valid_split="gold")


@pytest.mark.parametrize("line", [b'{"prompt": ', b"[1]", b'{"text": "\xff"}', b"null"])
def test_a_broken_line_is_named_before_any_model_is_built(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "x.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(ValueError, match=r"dataset .*x.jsonl line 3: no JSON object"):
        check_dataset(str(path), TOKENIZER, 64)


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


def test_a_broken_parquet_file_of_a_folder_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    (folder / "b.parquet").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"b.parquet is no parquet file: "):
        load_rows(str(folder))


def test_rows_of_another_kind_are_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [ROWS[0], {"messages": ANSWER}])
    with pytest.raises(
        ValueError, match=r"line 2: no `prompt` and no `completion`.*\['messages'\]"
    ):
        check_dataset(path, TOKENIZER, 64)


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
    args.dataloader_type, args.context_parallel_size = "single", 1
    args.full_validation, args.eval_iters = False, 0
    check_data_args(args)
    args.rank = 0
    with pytest.raises(ValueError, match="/gone is not there"):
        check_data_args(args)


def test_a_loader_that_shuffles_by_the_layout_is_refused() -> None:
    args = parser().parse_args(["--dataset", "any", "--no-packing"])
    args.dataloader_type, args.context_parallel_size = "cyclic", 1
    with pytest.raises(
        ValueError, match=r"dataloader_type is 'cyclic'.*leave --dataloader-type out"
    ):
        check_data_args(args)


def test_a_run_without_an_evaluation_interval_is_told_to_set_one() -> None:
    args = argparse.Namespace(eval_interval=None, skip_train=False, full_validation=False)
    with pytest.raises(ValueError, match=r"eval_interval is not given: set --eval-interval 1000"):
        check_eval_args(args)
    args.eval_interval = 1000
    check_eval_args(args)


def test_without_packing_nothing_must_be_kept_apart() -> None:
    args = argparse.Namespace(dataset="any", packing=False)
    assert attention_format(args) == "padded"


def test_no_data_at_all_is_refused() -> None:
    args = parser().parse_args([])
    for name in ("data_path", "data_args_path", "train_data_path", "per_split_data_args_path"):
        setattr(args, name, None)
    args.mock_data = args.reset_attention_mask = False
    args.context_parallel_size = 1
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
