"""Chats as people post them (OpenAI, ShareGPT, Hermes, xLAM), brought to one form."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from megalora.reading import NotJSONError, parse_json

type Row = Mapping[str, Any]
type Message = dict[str, Any]

# Columns of chats beside the messages themselves.
CHAT_COLUMNS = ("system", "tools", "functions", "documents", "chat_template_kwargs")

_SHARE_GPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}


class Chat(NamedTuple):
    """A conversation and what else its chat template is given.

    messages: dicts of role, content (text) and whatever else the row has. tool_calls are
        {type, function: {name, arguments: dict}}; `weight` 0 says that an answer is context.
    tools: [{type, function}], as `apply_chat_template` takes them.
    variables: further variables of the template, such as `documents` or `enable_thinking`.
    """

    messages: list[Message]
    tools: list[dict[str, Any]]
    variables: dict[str, Any]

    @property
    def answers(self) -> list[int]:
        """Return which messages are trained on: the assistant's, behind another message."""
        return [
            number
            for number, message in enumerate(self.messages)
            if number > 0 and message["role"] == "assistant" and message.get("weight") != 0
        ]


def read_chat(row: Row, schema: str, *, answer: str = "completion") -> Chat:
    """Return the chat of a row whose columns are those of `schema` (see `rows.SCHEMAS`).

    answer: the column that stands for `completion`. Raises ValueError, without the row's place, for
    what is no chat.
    """
    messages = _messages_of(row, schema, answer)
    system = row.get("system")
    if system:
        messages = _with_system(messages, _text("system", system))
    variables = dict(_parsed("chat_template_kwargs", row.get("chat_template_kwargs"), dict) or {})
    if taken := sorted(_RESERVED & set(variables)):
        raise ValueError(f"`chat_template_kwargs` has {taken}: give these as columns of the row")
    if row.get("documents"):
        variables["documents"] = _parsed("documents", row["documents"], list)
    tools = _tools(row)
    for message in messages:
        own = _tools(message)
        if own and tools and own != tools:
            raise ValueError("a message has other `tools` than its row: leave one of them out")
        tools = tools or own
        for name in ("tools", "functions"):
            message.pop(name, None)
    return Chat(messages, tools, variables)


def _messages_of(row: Row, schema: str, answer: str) -> list[Message]:
    if schema == "calls":
        calls = _parsed("answers", row["answers"], list)
        question = {"role": "user", "content": row["query"]}
        return _messages("query", [question, {"role": "assistant", "tool_calls": calls}])
    if schema != "completion":
        return _messages(schema, row[schema])
    context = _messages("prompt", row["prompt"])
    for message in context:
        message["weight"] = 0
    return context + _messages(answer, row[answer])


def _messages(column: str, value: object) -> list[Message]:
    raw = _parsed(column, value, list)
    if not raw:
        raise ValueError(f"`{column}` has no message: leave the row out")
    messages = []
    for number, message in enumerate(raw):
        try:
            messages.append(_message(message))
        except ValueError as error:
            raise ValueError(f"`{column}` {number}: {error}") from error
    return messages


def _message(raw: object) -> Message:
    if not isinstance(raw, Mapping):
        raise ValueError(f"{_short(raw)} is no message: write {{role, content}}")
    message = {key: value for key, value in raw.items() if value is not None}
    if "from" in message and "role" not in message:
        message = _from_share_gpt(message)
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError(f"a message has the role {_short(role)}: write system, user or assistant")
    if role == "function":  # OpenAI's name of it, before there were tools
        message["role"] = role = "tool"
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"weight {message['weight']!r} of a message is neither 0 nor 1")
    _read_calls(message)
    content = message.get("content", "" if "tool_calls" in message else None)
    if role == "tool" and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False)
    message["content"] = _text(f"content of the {role}", content)
    return message


def _from_share_gpt(message: Message) -> Message:
    """Return a message of `from` and `value` as one of role and content."""
    speaker, value = message.pop("from"), message.pop("value", None)
    if not isinstance(speaker, str) or speaker not in _SHARE_GPT_ROLES:
        raise ValueError(f"from {_short(speaker)} is none of {list(_SHARE_GPT_ROLES)}: rename it")
    key = "tool_calls" if speaker == "function_call" else "content"
    return {"role": _SHARE_GPT_ROLES[speaker], key: value, **message}


def _read_calls(message: Message) -> None:
    """Bring `tool_calls`, or OpenAI's older `function_call`, to one form, in place."""
    calls = message.pop("tool_calls", None)
    if calls is None and "function_call" in message:
        calls = message.pop("function_call")
    calls = _parsed("tool_calls", calls, (list, dict))
    if calls:
        message["tool_calls"] = [_call(c) for c in ([calls] if isinstance(calls, dict) else calls)]


def _call(raw: object) -> dict[str, Any]:
    given = raw if isinstance(raw, Mapping) else {}
    function = given.get("function", given)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"tool call {_short(raw)} names no function: write {{name, arguments}}")
    arguments = _parsed("arguments", function.get("arguments"), dict) or {}
    rest = {} if function is given else {k: v for k, v in given.items() if v is not None}
    call = {"name": function["name"], "arguments": arguments}
    return {"type": "function", **rest, "function": call}


def _tools(holder: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the tools of a row or of a message, each under {type, function}."""
    name = "tools" if holder.get("tools") else "functions"
    found = []
    for tool in _parsed(name, holder.get(name), list) or []:
        tool = _parsed(name, tool, dict)
        if not tool:
            raise ValueError(f"`{name}` has an empty entry: leave it out")
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return found


def _with_system(messages: list[Message], system: str) -> list[Message]:
    """Return messages with the row's system prompt before them."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise ValueError("the `system` column is not the system message: leave one of them out")
    return messages


def _text(name: str, value: object) -> str:
    """Return text; parts of text, as OpenAI writes them, are joined by line ends, as vLLM does."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{name} is {_short(value)}, not text")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise ValueError(f"{name} has a part that is not text: {_short(part)}")
        texts.append(text)
    return "\n".join(texts)


def _parsed[T](name: str, value: object, kind: type[T] | tuple[type[T], ...]) -> T | None:
    """Return a list or dict that is given as such or as JSON; None for nothing."""
    parsed = value
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            parsed = parse_json(value)
        except NotJSONError as error:
            raise ValueError(f"`{name}` is {_short(value)}, which is no JSON: {error}") from error
    if parsed is not None and not isinstance(parsed, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise ValueError(f"`{name}` is {_short(value)}, not a {names} or JSON of one")
    return parsed


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
