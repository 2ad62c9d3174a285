"""Chats: the forms that people post them in."""

import json

import pytest

from megalora.data.chats import Chat, read_chat
from megalora.data.examples import encode_rows
from megalora.data.tokenizers import ByteTokenizer, encoder_for
from tests.support.chat_templates import (
    CALL,
    CALLED,
    SAID,
    TOOL,
    trained,
)


@pytest.mark.parametrize("call", [CALL, CALL["function"], {**CALL, "id": "x"}])
@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_calls_have_one_form(call: dict, arguments: object) -> None:
    if "function" in call:
        call = {**call, "function": {**call["function"], "arguments": arguments}}
    else:
        call = {**call, "arguments": arguments}
    chat = read_chat(
        {"messages": [SAID[0], {"role": "assistant", "tool_calls": [call]}]}, "messages"
    )
    (found,) = chat.messages[1]["tool_calls"]
    assert (found["type"], found["function"]) == ("function", CALL["function"])
    assert chat.messages[1]["content"] == ""


def test_openais_older_function_calls_are_tool_calls() -> None:
    old = [
        SAID[0],
        {"role": "assistant", "content": None, "function_call": CALL["function"]},
        {"role": "function", "name": "add", "content": "2"},
    ]
    chat = read_chat({"messages": old, "functions": [TOOL["function"]]}, "messages")
    assert chat.messages[1]["tool_calls"] == [CALL]
    assert chat.messages[2]["role"] == "tool"
    assert chat.tools == [TOOL]


def test_share_gpt_is_read_by_its_speakers() -> None:
    turns = [
        ("human", "1+1?"),
        ("function_call", json.dumps(CALL["function"])),
        ("observation", "2"),
        ("gpt", "Two."),
    ]
    conversations = [{"from": speaker, "value": value} for speaker, value in turns]
    row = {"conversations": conversations, "system": "Be kind.", "tools": json.dumps([TOOL])}
    system = {"role": "system", "content": "Be kind."}
    assert read_chat(row, "conversations") == Chat([system, *CALLED], [TOOL], {})


def test_xlams_queries_and_answers_are_a_chat() -> None:
    row = {
        "query": "1+1?",
        "answers": json.dumps([CALL["function"]]),
        "tools": json.dumps([TOOL["function"]]),
    }
    assert read_chat(row, "calls") == Chat(CALLED[:2], [TOOL], {})


def test_prompts_and_completions_of_messages_train_on_the_completion() -> None:
    chat = read_chat({"prompt": [*SAID, SAID[0]], "completion": [SAID[1]]}, "completion")
    assert chat.answers == [3]


def test_an_answer_of_weight_0_is_context() -> None:
    row = {"messages": [SAID[0], {**SAID[1], "weight": 0}, *SAID]}
    assert read_chat(row, "messages").answers == [3]
    assert trained(row) == ["Ho<|im_end|>"]


def test_parts_of_text_are_joined_and_others_refused() -> None:
    parts = [{"type": "text", "text": "Look"}, {"type": "text", "text": "here"}]
    row = {"messages": [{"role": "user", "content": parts}, SAID[1]]}
    assert read_chat(row, "messages").messages[0]["content"] == "Look\nhere"
    parts.append({"type": "image_url", "image_url": {"url": "x"}})
    with pytest.raises(
        ValueError, match=r"`messages` 0: content of the user has a part .*image_url"
    ):
        read_chat(row, "messages")


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "`messages` has no message: leave the row out"),
        (
            [{"role": "user", "content": None}],
            "`messages` 0: content of the user is None, not text",
        ),
        ([{"content": "x"}], "a message has the role None"),
        (["x"], "'x' is no message"),
        ([{"from": "me", "value": "x"}], "from 'me' is none of .*'human'"),
        ([{"role": "assistant", "tool_calls": [{"id": 1}]}], "names no function"),
        ([{"role": "assistant", "tool_calls": "[{"}], "is no JSON"),
        ([{"role": "assistant", "content": "x", "weight": 0.5}], "weight 0.5 of a message"),
        ("Hi", "`messages` is 'Hi', which is no JSON"),
    ],
)
def test_what_is_no_chat_is_said_with_its_row(messages: object, message: str) -> None:
    rows = [{"messages": SAID}, {"messages": messages}]
    with pytest.raises(ValueError, match=f"dataset row 1: .*{message}"):
        list(encode_rows(rows, "messages", encoder_for(ByteTokenizer()), 64))


@pytest.mark.bad_input("a malformed file")
def test_two_system_prompts_are_refused() -> None:
    row = {"messages": [{"role": "system", "content": "a"}, *SAID], "system": "b"}
    with pytest.raises(ValueError, match="`system` column is not the system message"):
        read_chat(row, "messages")
