"""What a chat template makes of a chat: its tools and variables, and the tokens to train."""

import json

import pytest

from megalora.data.chats import read_chat
from megalora.data.examples import encode_rows
from megalora.data.tokenizers import ByteTokenizer, encoder_for
from tests.support.chat_templates import (
    AS_JSON,
    AS_TEXT,
    CALLED,
    CHATML,
    SAID,
    TOOL,
    encoder,
    texts,
    trained,
)

# --- tools and variables of the template ---


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL["function"])]])
@pytest.mark.parametrize("place", ["row", "message"])
def test_tools_reach_the_template(tools: object, place: str) -> None:
    row = {"messages": [dict(message) for message in CALLED]}
    (row if place == "row" else row["messages"][0])["tools"] = tools
    (text,) = texts(row)
    assert text.startswith("<|im_start|>tools\n" + json.dumps([TOOL]))
    assert trained(row) == ['<tool_call>add {"a": 1}</tool_call><|im_end|>Two.<|im_end|>']


@pytest.mark.parametrize("empty", [None, "", "[]", []])
def test_no_tools_are_no_tools(empty: object) -> None:
    assert texts({"messages": SAID, "tools": empty}, CHATML) == texts({"messages": SAID}, CHATML)


def test_arguments_are_text_where_the_template_adds_them_to_its_own() -> None:
    call = {"name": "add", "arguments": {"a": "é"}}
    row = {"messages": [SAID[0], {"role": "assistant", "tool_calls": [call]}]}
    assert '<tool_call>add ```{"a": "é"}```</tool_call>' in texts(row, AS_TEXT)[0]


def test_tools_that_the_system_message_lists_are_not_given_twice() -> None:
    system = {"role": "system", "content": f"Call: <tools>{json.dumps(TOOL)}</tools>"}
    own = encoder()
    (tokens,) = own.chat(read_chat({"messages": [system, *SAID], "tools": [TOOL]}, "messages"))
    assert own.tokenizer.decode(tokens.ids).count('"add"') == 1
    assert list(own.notes) == ["rows name their tools in the system message: not given once more"]


def test_a_tools_answer_has_the_templates_tags_once() -> None:
    template = AS_JSON.replace("{{ m.content }}", "<tool_response>{{ m.content }}</tool_response>")
    answer = {"role": "tool", "content": "<tool_response>\n2\n</tool_response>"}
    (text,) = texts({"messages": [*CALLED[:2], answer, CALLED[3]]}, template)
    assert "tool\n<tool_response>2</tool_response>" in text


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"tools": [TOOL]}, "tools"),
        ({"documents": [{"text": "x"}]}, "documents"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "enable_thinking"),
    ],
)
def test_what_the_template_does_not_take_is_named(more: dict, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"chat template takes no \['{name}'\], which the row has"
    ):
        texts({"messages": SAID, **more}, CHATML)
    with pytest.raises(ValueError, match=rf"byte tokenizer takes no \['{name}'\]"):
        encoder_for(ByteTokenizer()).chat(read_chat({"messages": SAID, **more}, "messages"))


def test_variables_of_a_row_reach_the_template() -> None:
    template = CHATML + "{{ '' if not documents else documents[0].text }}{{ mood or '' }}"
    row = {
        "messages": SAID,
        "documents": [{"text": "Doc"}],
        "chat_template_kwargs": {"mood": "gay"},
    }
    with pytest.raises(ValueError, match="not usable"):  # rendered behind the generation prompt too
        texts(row, template)
    template = "{{ documents[0].text if documents }}{{ mood or '' }}" + CHATML
    assert texts(row, template)[0].startswith("Docgay<|im_start|>user")
    with pytest.raises(ValueError, match=r"`chat_template_kwargs` has \['tools'\]"):
        texts({"messages": SAID, "chat_template_kwargs": {"tools": []}}, template)


def test_calls_that_the_template_leaves_out_are_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves out the tool calls of \['add'\]"):
        texts({"messages": CALLED}, CHATML)


def test_messages_that_the_template_leaves_out_are_refused() -> None:
    template = CHATML.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}"
    )
    with pytest.raises(ValueError, match="leaves out message 1, of the role 'tool'"):
        texts({"messages": [SAID[0], {"role": "tool", "content": "2"}, SAID[1]]}, template)


def test_what_a_template_refuses_is_said_in_its_words() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"dataset row 0: the chat template refuses .*alternate"):
        list(encode_rows([{"messages": SAID}], "messages", encoder(template), 64))


# --- which tokens are trained ---

# As Qwen3's: thoughts of answers before the last question are left out.
THOUGHTS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "<|im_start|>{{ m.role }}\n{% if m.reasoning_content and loop.index0 > ns.last %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def thought(content: str) -> dict:
    return {"role": "assistant", "content": content, "reasoning_content": f"hm {content}"}


def test_every_answer_is_trained_once_as_the_model_gives_it() -> None:
    tool = {"role": "tool", "content": "2"}
    messages = [SAID[0], thought("a"), SAID[0], thought("b"), tool, thought("c")]
    assert trained({"messages": messages}, THOUGHTS) == [
        "<think>hm a</think>a<|im_end|>",
        "<think>hm b</think>b<|im_end|><think>hm c</think>c<|im_end|>",
    ]
    _, later = texts({"messages": messages}, THOUGHTS)
    assert "assistant\na<|im_end|>" in later


def test_answers_before_a_last_question_keep_their_thoughts() -> None:
    row = {"messages": [SAID[0], thought("a"), SAID[0]]}
    assert trained(row, THOUGHTS) == ["<think>hm a</think>a<|im_end|>"]


# As Mistral's: the system prompt stands before a question that ends the chat, and nowhere else.
LATE_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{% if loop.last and "
    "messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }}/user"
    "{% elif m.role == 'assistant' %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


def test_answers_stand_behind_the_prompt_that_the_model_is_given() -> None:
    again = {"role": "assistant", "content": "Hi/user Ho"}  # as the prompt itself ends
    row = {"messages": [{"role": "system", "content": "Be kind."}, *SAID, SAID[0], again]}
    assert texts(row, LATE_SYSTEM) == [
        "<|im_start|>Be kind. Hi/user Ho<|im_end|>",
        "<|im_start|>Hi/user Ho<|im_end|><|im_start|>Be kind. Hi/user Hi/user Ho<|im_end|>",
    ]
    assert trained(row, LATE_SYSTEM) == [" Ho<|im_end|>", " Hi/user Ho<|im_end|>"]


def test_generation_blocks_say_what_is_trained() -> None:
    block = "{% generation %}{{ m.content }}{% endgeneration %}"
    by_role = "{% if m.role == 'assistant' %}" + block + "{% else %}{{ m.content }}{% endif %}"
    template = CHATML.replace("{{ m.content }}", by_role)
    assert trained({"messages": [*SAID, *SAID]}, template) == ["HoHo"]
    half = [SAID[0], {**SAID[1], "weight": 0}, *SAID]
    assert trained({"messages": half}, template) == ["Ho"]
    # Where the generation prompt is not how answers begin (DeepSeek-R1), only blocks can say it.
    prompted = template.replace("assistant\n{% endif", "assistant\n<think>{% endif")
    assert trained({"messages": SAID}, prompted) == ["Ho"]
    with pytest.raises(ValueError, match=r"not how this answer begins.*\{% generation %\} blocks"):
        trained(
            {"messages": SAID}, CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")
        )


def test_answers_that_the_template_shortens_are_noted() -> None:
    own = encoder(CHATML.replace("m.content", "m.content.split('</think>')[-1]"))
    answer = {"role": "assistant", "content": "<think>hm</think>Ho"}
    own.chat(read_chat({"messages": [SAID[0], answer]}, "messages"))
    assert own.notes == {"answers are not whole in what the chat template makes of them": 1}
