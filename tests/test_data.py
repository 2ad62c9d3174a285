"""Datasets: where rows come from, what they hold, how they are split, and what is said of them."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from megalora.data import ByteTokenizer, build_datasets
from megalora.data.examples import hold_out
from megalora.data.rows import load_rows

pytestmark = pytest.mark.usefixtures("datasets_cache")

TOKENIZER = ByteTokenizer()
ANSWER = [{"role": "assistant", "content": "Pong"}]
ROWS = [{"prompt": f"Count to {k}: ", "completion": f"{k} it is."} for k in range(40)]


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
