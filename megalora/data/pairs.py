"""What a row of preferences holds: a chosen and a rejected answer, as text or as chats.

The forms are those that TRL documents: `prompt`, `chosen` and `rejected`, or `chosen` and
`rejected` that begin with the prompt.
"""

from collections.abc import Mapping

from megalora.data.chats import Chat, Message, Row, read_chat
from megalora.data.examples import Content

ANSWERS = ("chosen", "rejected")


def read_pair(row: Row) -> tuple[Content, Content]:
    """Return the chosen and the rejected answer of a row, each with its prompt.

    Raises ValueError, without the row's place, for what is no preference.
    """
    if missing := [name for name in ANSWERS if row.get(name) is None]:
        filled = [name for name, value in row.items() if value is not None]
        raise ValueError(
            f"no {' and no '.join(f'`{name}`' for name in missing)}, but {filled}: a row has "
            "`chosen` and `rejected`, and a `prompt` where these do not begin with it"
        )
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise ValueError("of `chosen` and `rejected` one is text: write both in one form")
    if row["chosen"] == row["rejected"]:
        raise ValueError("`chosen` and `rejected` are equal: none is preferred, leave the row out")
    return _texts(row) if isinstance(row["chosen"], str) else _chats(row)


def _texts(row: Row) -> tuple[Content, Content]:
    prompt, answers = row.get("prompt"), [row[name] for name in ANSWERS]
    if prompt is None:
        prompt = shared(*answers)
        # The space before the first word that differs is the word's, as in TRL.
        prompt = prompt[:-1] if prompt.endswith(" ") else prompt
        answers = [answer[len(prompt) :] for answer in answers]
    elif not isinstance(prompt, str):
        raise ValueError("`prompt` is not text, but `chosen` is: write all three in one form")
    if not prompt.strip():
        raise ValueError(
            "`prompt` is empty, or `chosen` and `rejected` do not begin alike: give the `prompt`"
        )
    for name, answer in zip(ANSWERS, answers, strict=True):
        if not answer.strip():
            raise ValueError(f"`{name}` has no answer behind its prompt: leave the row out")
    return Content(prompt=prompt, text=answers[0]), Content(prompt=prompt, text=answers[1])


def _chats(row: Row) -> tuple[Content, Content]:
    answers = [_list(name, row[name]) for name in ANSWERS]
    prompt = row.get("prompt")
    if isinstance(prompt, str) or prompt is None:
        prefix = shared(*answers)
        if prompt is not None and not any(_says(message, prompt) for message in prefix):
            raise ValueError(
                "`prompt` is text that no message says which both `chosen` and `rejected` begin "
                "with: write it as messages, [{role: user, content: ...}]"
            )
        if not prefix:
            raise ValueError(
                "`chosen` and `rejected` begin with no message that both have: give the `prompt`"
            )
        prompt, answers = prefix, [answer[len(prefix) :] for answer in answers]
    else:
        prompt = _list("prompt", prompt)
        answers = [a[len(prompt) :] if a[: len(prompt)] == prompt else a for a in answers]
    chosen, rejected = (
        Content(chat=_chat({**row, "prompt": prompt, name: answer}, name))
        for name, answer in zip(ANSWERS, answers, strict=True)
    )
    return chosen, rejected


def _chat(row: Row, name: str) -> Chat:
    """Return the chat of a prompt and one of its answers, which the assistant begins and ends."""
    if not row[name]:
        raise ValueError(f"`{name}` has no answer behind its prompt: leave the row out")
    chat = read_chat(row, "completion", answer=name)
    answer = chat.messages[-len(row[name]) :]
    for message, where in ((answer[0], "begins"), (answer[-1], "ends")):
        if message["role"] != "assistant":
            raise ValueError(
                f"`{name}` {where} with a message of the role {message['role']!r} behind its "
                "prompt: the answer is the assistant's, and `prompt` what it begins with"
            )
    for message in answer:
        if not message["content"].strip() and "tool_calls" not in message:
            raise ValueError(f"`{name}` has an empty message: leave the row out")
    return chat


def _list(name: str, value: object) -> list[Message]:
    if isinstance(value, Mapping):  # one message
        return [dict(value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"`{name}` is {value!r:.60}, neither text nor messages")
    return value


def _says(message: object, text: str) -> bool:
    return isinstance(message, Mapping) and text in (message.get("content"), message.get("value"))


def shared[T: (str, list[Message], list[int])](one: T, other: T) -> T:
    """Return what both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((k for k, (a, b) in pairs if a != b), min(len(one), len(other)))]
