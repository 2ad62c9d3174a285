"""Chats through a tokenizer's chat template: the text, and which of it the assistant says."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Protocol

from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megalora.data.chats import Chat, Message
from megalora.data.template_limits import template_errors, time_limit

type Span = tuple[int, int]

_GENERATION = re.compile(r"{%-?\s*(?:end)?generation\s*-?%}")
_REASONING = {"reasoning", "reasoning_content", "thinking"}  # transformers fills all from one


class HuggingFaceTokenizer(Protocol):
    """What is used of a tokenizer of transformers, whose own types leave much open."""

    chat_template: str | None
    is_fast: bool
    bos_token_id: Any
    eos_token_id: Any
    pad_token_id: int | None
    special_tokens_map: Mapping[str, str]
    added_tokens_encoder: Mapping[str, int]

    def __call__(self, text: str, **options: bool) -> Any:
        """Return the tokens of a text, as `input_ids` of a BatchEncoding."""
        ...

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> Any:
        """Return the text of tokens."""
        ...

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> str:
        """Return the text of a conversation; with `tokenize=False`."""
        ...

    def get_chat_template(self, chat_template: None, tools: Sequence[object] | None) -> str:
        """Return the source of the template for these tools."""
        ...


class ChatTemplate:
    """The chat template of a Hugging Face tokenizer.

    notes: counts what the template does to answers, by a sentence each.
    """

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.tokenizer = tokenizer
        self.notes: Counter[str] = Counter()

    def examples(self, chat: Chat) -> list[tuple[str, list[Span]]]:
        """Return texts, each with the spans (in characters) that the assistant says there.

        One text for the whole chat, where every answer stands in it as the model gave it. Templates
        that render an earlier answer differently from the last one (Qwen3 drops its thoughts) would
        teach the model what it never says: such an answer is taken from the longest text that has
        it unchanged, at the latest the one that ends with it. So every answer is trained on once.

        An answer is what follows the generation prompt, to the end of its turn; in a template with
        `{% generation %}` blocks it is what stands in them. Raises ValueError for a template that
        cannot render the chat, or leaves out messages, tools, tool calls or variables.
        """
        chat = self._as_the_template_takes_it(chat)
        self._check_variables(chat)
        whole = self._render(chat, chat.messages)
        answers = [self._answer(chat, number) for number in chat.answers]
        texts = [whole, *(text for text, _ in reversed(answers))]
        self._check_messages(chat, texts)
        spans: dict[str, list[Span]] = {}
        for text, own in answers:
            host = next(t for t in texts if t.startswith(text))
            spans.setdefault(host, []).extend(own)
        return list(spans.items()) or [(whole, [])]

    def prompt(self, chat: Chat) -> str:
        """Return the text of a chat with the generation prompt, behind which an answer goes.

        Raises ValueError as `examples` does.
        """
        chat = self._as_the_template_takes_it(chat)
        self._check_variables(chat)
        text = self._render(chat, chat.messages, add_generation_prompt=True)
        self._check_messages(chat, [text])
        return text

    def end_of_turn(self, chat: Chat) -> str:
        """Return the token that the template closes an answer to the chat with; empty for none."""
        chat = self._as_the_template_takes_it(chat)
        answer: Message = {"role": "assistant", "content": "."}
        text = self._render(chat, [*chat.messages, answer]).rstrip()
        ends = (token for token in self.tokenizer.added_tokens_encoder if text.endswith(token))
        return max(ends, key=len, default="")

    def reads(self, key: str) -> bool:
        """Say whether the template reads a key of messages: its name stands there."""
        names = _REASONING if key in _REASONING else {key}
        return any(re.search(rf"\b{re.escape(name)}\b", self._source(None)) for name in names)

    def _answer(self, chat: Chat, number: int) -> tuple[str, list[Span]]:
        """Return the text through an answer, and the spans of the answer in it."""
        messages = chat.messages[: number + 1]
        if _GENERATION.search(self._source(chat)):
            text, blocks = self._render_blocks(chat, messages)
            start = _shared_length(self._render(chat, messages[:-1]), text)
            spans = [(low, high) for low, high in blocks if low >= start]
        else:
            head = self._render(chat, messages[:-1], add_generation_prompt=True)
            text = self._render(chat, messages)
            answer = _behind(head, text, messages)
            if answer is None:
                raise ValueError(
                    "chat template is not usable: its generation prompt is not how this answer "
                    f"begins, {head[-40:]!r} against {text[len(head) - 40 : len(head)]!r}: set its "
                    "switch, such as enable_thinking, in `chat_template_kwargs`, or give another "
                    "--chat-template, one with {% generation %} blocks around answers"
                )
            text, start = head + answer, len(head)
            spans = [(start, self._end_of_turn(text))]
        self._check_answer(messages[-1], text[start:])
        return text, spans

    def _end_of_turn(self, text: str) -> int:
        """Return where a turn's end token stops: nobody generates the line end behind it."""
        stripped = text.rstrip()
        has_end = stripped.endswith(tuple(self.tokenizer.added_tokens_encoder))
        return len(stripped) if has_end else len(text)

    def _as_the_template_takes_it(self, chat: Chat) -> Chat:
        """Return the chat without what Hermes' data would have twice, arguments as text if asked.

        Its system message lists the tools of the row; its tools answer in the template's tags.
        """
        if not self.tokenizer.chat_template:
            raise ValueError(
                "dataset has chats but the tokenizer has no chat template: give --chat-template, "
                "or text in `prompt`, and in `completion` where there is one"
            )
        tools, messages = chat.tools, chat.messages
        if tools and "<tools>" in messages[0]["content"] and messages[0]["role"] == "system":
            self.notes["rows name their tools in the system message: not given once more"] += 1
            tools = []
        if "<tool_response>" in self._source(chat):
            messages = [_without_response_tags(m) if m["role"] == "tool" else m for m in messages]
        if any("tool_calls" in message for message in messages) and self._wants_json_arguments:
            messages = [_with_json_arguments(message) for message in messages]
        return Chat(messages, tools, chat.variables)

    @cached_property
    def _wants_json_arguments(self) -> bool:
        """Say whether the template adds a call's arguments to its text (DeepSeek): no dict can."""
        call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        question: Message = {"role": "user", "content": "q"}
        answer: Message = {"role": "assistant", "content": "", "tool_calls": [call]}
        try:
            with time_limit():
                self.tokenizer.apply_chat_template([question, answer], tokenize=False)
        except TypeError:
            return True
        except Exception:  # the template's own refusal, met again in the chat
            return False
        return False

    def _check_variables(self, chat: Chat) -> None:
        """Raise ValueError for tools and variables that the template does not look at."""
        given = [*(["tools"] if chat.tools else []), *chat.variables]
        if left := [name for name in given if name not in _variables(self._source(chat))]:
            name = getattr(self.tokenizer, "name_or_path", "")
            raise ValueError(
                f"the chat template{f' of {name}' if name else ''} takes no {left}, which the row "
                "has: give another --chat-template, or leave them out of the data"
            )

    def _check_messages(self, chat: Chat, texts: list[str]) -> None:
        """Raise ValueError where a message that is not the assistant's is in none of the texts."""
        packed = "\0".join(map(_squeeze, texts))
        for number, message in enumerate(chat.messages):
            content = message["content"]
            forms = (content, json.dumps(content, ensure_ascii=False)[1:-1])
            if message["role"] != "assistant" and not any(_squeeze(f) in packed for f in forms):
                raise ValueError(
                    f"the chat template leaves out message {number}, of the role "
                    f"{message['role']!r}: rename the role or give another --chat-template"
                )

    def _check_answer(self, message: Message, rendered: str) -> None:
        """Raise ValueError where tool calls are not in their answer; note where text is not."""
        names = [call["function"]["name"] for call in message.get("tool_calls", [])]
        if left := [name for name in names if name not in rendered]:
            raise ValueError(
                f"the chat template leaves out the tool calls of {left}: give a --chat-template "
                "that renders `tool_calls`"
            )
        # The generation prompt may have opened the thoughts.
        if _squeeze(message["content"]).removeprefix("<think>") not in _squeeze(rendered):
            self.notes["answers are not whole in what the chat template makes of them"] += 1

    def _source(self, chat: Chat | None) -> str:
        return self.tokenizer.get_chat_template(None, (chat.tools if chat else None) or None)

    def _render(
        self, chat: Chat, messages: list[Message], *, add_generation_prompt: bool = False
    ) -> str:
        with template_errors():
            return self.tokenizer.apply_chat_template(
                messages,
                tools=chat.tools or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **chat.variables,
            )

    def _render_blocks(self, chat: Chat, messages: list[Message]) -> tuple[str, list[Span]]:
        """Return the text and where its {% generation %} blocks stand."""
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template
        with template_errors():
            texts, blocks = render(
                conversations=[messages],
                tools=chat.tools or None,
                chat_template=self._source(chat),
                return_assistant_tokens_mask=True,
                **{**self.tokenizer.special_tokens_map, **chat.variables},
            )
        return texts[0], blocks[0]


@lru_cache(maxsize=8)
def _variables(source: str) -> frozenset[str]:
    """Return the variables that a template is given from outside."""
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    with template_errors():
        tree = environment.parse(_GENERATION.sub("", source))
        # NOTE: it computes what is constant.
        return frozenset(meta.find_undeclared_variables(tree))


def _behind(head: str, text: str, messages: list[Message]) -> str | None:
    """Return what the last of messages adds behind the generation prompt; None where it cannot.

    head: the messages before, with the generation prompt. text: all of them. Mistral writes the
    system prompt before a question that is the last message, so text need not begin with head: both
    have the last question, and the prompt behind it.
    """
    if text.startswith(head):
        return text[len(head) :]
    question, answer = (message["content"].strip() for message in messages[-2:])
    prompt = head[head.rfind(question) :] if question in head else ""
    at = text.rfind(prompt, 0, text.rfind(answer)) if prompt else -1
    return None if at < 0 else text[at + len(prompt) :]


def _with_json_arguments(message: Message) -> Message:
    """Return a message whose tool calls have their arguments as JSON, written as `tojson` does."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _without_response_tags(message: Message) -> Message:
    """Return a tool's message without the tags that the template puts around it."""
    content = message["content"].strip()
    inner = content.removeprefix("<tool_response>").removesuffix("</tool_response>")
    is_tagged = len(content) - len(inner) == len("<tool_response></tool_response>")
    return {**message, "content": inner.strip()} if is_tagged else message


def _shared_length(one: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _squeeze(text: str) -> str:
    return "".join(text.split())
