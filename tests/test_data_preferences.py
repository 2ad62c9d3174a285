"""Rows of preferences: their forms, which tokens count, what is cut, and what is refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megalora.data.preferences import Pair, encode_pairs, gather_pairs, load_preferences
from megalora.data.tokenizers import ByteTokenizer, Encoder, Tokens, encoder_for
from tests.support.chat_templates import CHATML, encoder, hugging_face_tokenizer, trained_text
from tests.test_data import write_jsonl

USER, GOOD, BAD = (
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "assistant", "content": "No."},
)
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TEXT = {"prompt": "Hello?", "chosen": " Hello!", "rejected": " No."}


def pair(row: dict[str, Any], own: Encoder | None = None) -> Pair:
    (found,) = encode_pairs([row], own or encoder(CHATML))
    return found


def answers(row: dict[str, Any], tokenizer: Any = None) -> list[str]:
    """Return the text of the tokens that count, of the chosen and of the rejected answer."""
    tokenizer = tokenizer or hugging_face_tokenizer(CHATML)
    return [trained_text(tokenizer, tokens) for tokens in pair(row, encoder_for(tokenizer))]


@pytest.mark.parametrize(
    "row",
    [
        CHAT,
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hello?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {
            "chosen": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hello!"}],
            "rejected": [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "No."}],
        },
    ],
    ids=["explicit", "implicit", "text beside", "repeated", "one message", "ShareGPT"],
)
def test_all_forms_of_a_chat_are_one(row: dict[str, Any]) -> None:
    assert pair(row) == pair(CHAT)


def test_the_answer_of_a_chat_is_what_the_template_writes_behind_the_prompt() -> None:
    assert answers(CHAT) == ["Hello!<|im_end|>\n", "No.<|im_end|>\n"]
    decode = hugging_face_tokenizer(CHATML).decode
    expected = "<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n"
    assert decode(pair(CHAT).rejected.ids) == expected


@pytest.mark.parametrize(
    "row",
    [TEXT, {"chosen": "Hello? Hello!", "rejected": "Hello? No."}],
    ids=["explicit", "implicit"],
)
def test_the_answer_of_a_text_ends_with_the_end_token(row: dict[str, Any]) -> None:
    assert answers(row) == [" Hello!<|eos|>", " No.<|eos|>"]
    assert pair(row) == pair(TEXT)


def test_an_end_token_in_the_text_is_not_doubled() -> None:
    assert answers({**TEXT, "chosen": " Hello!<|eos|>"}) == [" Hello!<|eos|>", " No.<|eos|>"]


def test_a_token_of_prompt_and_answer_that_the_answers_do_not_share_is_theirs() -> None:
    row = {"prompt": "He", "chosen": "llo", "rejected": "y"}
    both = pair(row)
    tokenizer = hugging_face_tokenizer(CHATML)
    assert tokenizer.decode(both.chosen.ids[:1]) == "Hello"
    # The first token follows nothing, so that it has no probability.
    assert [tokens.trained[0] for tokens in both] == [False, False]
    behind = pair({**row, "prompt": "And He"})
    assert trained_text(tokenizer, behind.chosen).startswith("Hello")


def test_of_a_long_answer_what_tools_say_does_not_count() -> None:
    tool = {"role": "tool", "content": "Good bye."}
    row = {**CHAT, "chosen": [{**GOOD, "content": "And now?"}, tool, GOOD]}
    chosen, _ = answers(row)
    assert "Good bye." not in chosen
    assert "And now?" in chosen
    assert "Hello!" in chosen


def test_the_byte_tokenizer_takes_both_forms() -> None:
    tokenizer = ByteTokenizer()
    for row in (CHAT, {**TEXT, "chosen": "Hello!", "rejected": "No."}):
        assert answers(row, tokenizer) == ["Hello!", "No."]
        assert [tokens.ids[-1] for tokens in pair(row, encoder_for(tokenizer))] == [
            tokenizer.eos
        ] * 2


# === Cutting, order ===


def tokens(prompt: int, *answer: int) -> Tokens:
    return Tokens([7] * prompt + list(answer), [False] * prompt + [True] * len(answer))


def test_answers_lose_their_end_and_pairs_without_one_are_counted() -> None:
    pairs = [
        Pair(tokens(2, 1), tokens(2, 2, 3)),
        Pair(tokens(2, 1, 2, 3, 4, 5), tokens(2, 3)),  # cut
        Pair(tokens(4, 1), tokens(4, 2)),  # no room
        Pair(tokens(2, 1, 2, 3), tokens(2, 1, 2, 4)),  # alike as cut
    ]
    found = gather_pairs(pairs, "x", 4)
    assert (len(found), found.num_cut, found.num_beyond, found.num_alike) == (2, 1, 1, 1)
    assert list(found) == [pairs[0], Pair(tokens(2, 1, 2), tokens(2, 3))]


def test_a_dataset_without_room_for_an_answer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x leaves no pair .*: of 1 the prompt alone fills .* 2"):
        gather_pairs([Pair(tokens(2, 1), tokens(2, 2))], "x", 2)


def test_every_pass_has_each_pair_once_in_an_order_of_its_own() -> None:
    found = gather_pairs([Pair(tokens(1, k), tokens(1, 100 + k)) for k in range(10)], "x", 8)
    dealt = [p.chosen.ids[1] for iteration in range(10) for p in found.batch(iteration, 4, seed=5)]
    assert Counter(dealt) == dict.fromkeys(range(10), 4)
    passes = [dealt[k : k + 10] for k in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len({tuple(one) for one in passes}) == 4
    assert dealt[:4] != [p.chosen.ids[1] for p in found.batch(0, 4, seed=6)]


def test_held_out_pairs_are_not_trained_on_and_the_log_says_what_is_unused(tmp_path: Path) -> None:
    rows = [{**TEXT, "prompt": f"{k} Hello?", "score": 1} for k in range(10)]
    lines: list[str] = []
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    own = encoder(CHATML)
    train, valid = load_preferences(path, own, 64, valid_fraction=0.2, log=lines.append)
    assert valid is not None
    texts = [[own.tokenizer.decode(p.chosen.ids) for p in part] for part in (train, valid)]
    assert [len(part) for part in texts] == [8, 2]
    assert not set(texts[0]) & set(texts[1])
    assert lines[0].startswith("train data: 8 pairs, ")
    assert lines[2].endswith("nothing is made of ['score']")


# === What is refused ===

LINE = "dataset .*x.jsonl line 2: "


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, r"no `rejected`, but \['prompt', 'chosen'\]"),
        ({"text": "a"}, r"no `chosen` and no `rejected`, but \['text'\]"),
        ({**TEXT, "chosen": None}, "no `chosen`"),
        ({**TEXT, "rejected": " Hello!"}, "`chosen` and `rejected` are equal"),
        ({**CHAT, "rejected": [GOOD]}, "`chosen` and `rejected` are equal"),
        ({**TEXT, "rejected": " "}, "`rejected` has no answer behind its prompt"),
        ({"chosen": "Hello? No", "rejected": "Hello?"}, "`rejected` has no answer"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "`rejected` has no answer"),
        ({**CHAT, "chosen": [{**GOOD, "content": ""}]}, "`chosen` has an empty message"),
        ({**TEXT, "prompt": " "}, "`prompt` is empty, or"),
        ({"chosen": "a", "rejected": "b"}, "`prompt` is empty, or .* do not begin alike"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "`chosen` and .* begin with no message that both"),
        ({**TEXT, "prompt": [USER]}, "`prompt` is not text, but `chosen` is"),
        ({**CHAT, "prompt": "Bye?"}, "`prompt` is text that no message says"),
        ({**CHAT, "chosen": "Hello!"}, "of `chosen` and `rejected` one is text"),
        ({**CHAT, "chosen": [{**USER, "content": "Who?"}, GOOD]}, "`chosen` begins with .*'user'"),
        ({**CHAT, "chosen": [GOOD, USER]}, "`chosen` ends with a message of the role 'user'"),
        ({**CHAT, "chosen": 5}, "`chosen` is 5, neither text nor messages"),
        ({**CHAT, "chosen": []}, r"`chosen` is \[\], neither"),
        ({**CHAT, "prompt": 5}, "`prompt` is 5, neither"),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, "`chosen` 0: content of the assistant"),
        ({**CHAT, "chosen": ["Hello!"]}, "`chosen` 0: 'Hello!' is no message"),
        ({**CHAT, "prompt": [{"content": "x"}]}, "`prompt` 0: a message has the role None"),
        ({**CHAT, "tools": "{"}, "`tools` is '{', which is no JSON"),
    ],
)
def test_what_is_no_preference_is_refused_with_its_line(
    row: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [TEXT, row])
    with pytest.raises(ValueError, match=LINE + message):
        load_preferences(path, encoder(CHATML), 64)


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize("line", ['{"prompt": "a", "chosen": ', "[1]", '"text"', "{} {}"])
def test_a_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(f"{json.dumps(TEXT)}\n{line}\n")
    with pytest.raises(ValueError, match=LINE + "no JSON object"):
        load_preferences(str(path), encoder(CHATML), 64)


def test_chats_need_a_template(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [CHAT])
    own = encoder_for(hugging_face_tokenizer(None))
    with pytest.raises(ValueError, match=r"line 1: .*no chat template"):
        load_preferences(path, own, 64)
