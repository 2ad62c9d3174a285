"""Which rows of the vocabulary are a base's own: no token is masked or trimmed by a stale flag."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.forked import call

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 120,
}


def sizes_of(cases: list[dict[str, Any]], root: Path) -> list[int]:
    """Return the rows of each case: flags, and what its base is; the tokenizer has 100 tokens."""
    from megalora.hf.one_process import one_process
    from megalora.training import vocabulary

    vocabulary.get_tokenizer = lambda: SimpleNamespace(vocab_size=100)
    found = []
    with one_process():
        for number, case in enumerate(cases):
            source = root / str(number)
            source.mkdir()
            args: Any = SimpleNamespace(vocab_size=case.get("flag"), hf_model=None)
            if case.get("hf"):
                (source / "config.json").write_text(json.dumps(TINY_LLAMA))
                args.hf_model = str(source)
            elif "rows" in case:
                write_checkpoint(source, case["rows"], case.get("saved", False))
            has_base = "rows" in case or args.hf_model
            found.append(vocabulary.vocab_size(args, str(source) if has_base else None))
    return found


def write_checkpoint(root: Path, rows: int, saved: int | bool | None) -> None:
    """Write a base's table; saved: --vocab-size of the run that did, False without flags."""
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    name = "embedding.word_embeddings.weight"
    state: dict[str, Any] = {
        "model": {name: ShardedTensor.from_rank_offsets(name, torch.zeros(rows, 4))}
    }
    if saved is not False:
        state["args"] = argparse.Namespace(vocab_size=saved)
    (root / "release").mkdir()
    dist_checkpointing.save(state, str(root / "release"))
    (root / "latest_checkpointed_iteration.txt").write_text("release")


CASES = {
    "the tokenizer's": ({}, 100),
    "a flag that is too small": ({"flag": 60}, 100),
    "a base with more rows than tokens": ({"flag": 128}, 128),
    "config.json, whatever the flag": ({"hf": True, "flag": 60}, 120),
    "an imported base, unpadded": ({"rows": 110}, 110),
    "an imported base of fewer tokens": ({"rows": 90}, 100),
    "a trained base, padded": ({"rows": 256, "saved": None}, 100),
    "a trained base with more rows than tokens": ({"rows": 256, "saved": 130, "flag": 60}, 130),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    cases = [case for case, _ in CASES.values()]
    sizes = call(sizes_of, cases, tmp_path_factory.mktemp("bases"))
    return dict(zip(CASES, sizes, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_no_row_of_the_base_is_taken_for_padding(name: str, found: dict[str, int]) -> None:
    assert found[name] == CASES[name][1]


def in_softmax(base: int) -> int:
    """Return the rows in the softmax of a base whose tokenizer has 100 tokens."""
    from megalora.training import vocabulary

    vocabulary.get_tokenizer = lambda: SimpleNamespace(vocab_size=100)
    args: Any = SimpleNamespace(vocab_size=base)
    return vocabulary.rows_in_softmax(args)


def test_a_token_that_the_base_lacks_has_a_logit_all_the_same() -> None:
    assert call(in_softmax, 99) == 100
    assert call(in_softmax, 120) == 120
