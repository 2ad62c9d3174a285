"""Tokenizers, brought to one interface: text, prompt and completion, and chats to marked tokens."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol, cast

from megalora.data.chat_template import ChatTemplate, HuggingFaceTokenizer
from megalora.data.chats import Chat

type Tokenizer = ByteTokenizer | MegatronTokenizer | HuggingFaceTokenizer


class Tokens(NamedTuple):
    """The tokens of one example; `trained[k]` says whether token k is a target of the loss."""

    ids: list[int]
    trained: list[bool]


class MegatronTokenizer(Protocol):
    """What Megatron asks of a tokenizer."""

    @property
    def eod(self) -> int:
        """Return the token that ends a document."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        ...

    def detokenize(self, ids: list[int]) -> str:
        """Return the text of tokens."""
        ...


class Encoder(Protocol):
    """What the datasets need from a tokenizer.

    notes: sentences on what happened to rows, each with the number of them.
    """

    pad_id: int
    notes: Counter[str]

    def text(self, text: str) -> Tokens:
        """Encode a document: every token is trained on."""
        ...

    def completion(self, prompt: str, completion: str) -> Tokens:
        """Encode a prompt and its completion: the completion is trained on."""
        ...

    def chat(self, chat: Chat) -> list[Tokens]:
        """Encode a conversation: what the assistant says is trained on."""
        ...

    def unread_keys(self, chat: Chat) -> set[str]:
        """Return the keys of messages that no token comes from."""
        ...

    def prompt(self, content: str | Chat) -> list[int]:
        """Encode what an answer is sampled behind."""
        ...

    def stops(self, content: str | Chat) -> set[int]:
        """Return the tokens that end an answer to such a prompt."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        ...


class ByteTokenizer:
    """Tokenizer whose vocabulary is the 256 bytes and six special tokens: it needs no files.

    It has what Megatron asks of a tokenizer (`tokenize`, `detokenize`, `vocab_size`, `eod`, ...).
    A chat is laid out as `bos, (role, content, eos) ...`.
    """

    bos, eos, pad, system, user, assistant = range(256, 262)
    vocab_size = 262
    eod = eos
    unique_identifiers: dict[str, str] = {"class": "megalora.data.ByteTokenizer"}  # noqa: RUF012

    def tokenize(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of `text`."""
        return list(text.encode())

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, without special tokens; broken UTF-8 shows as U+FFFD."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class ByteEncoder:
    """Encoder of the byte tokenizer and its plain chat layout."""

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad
        self.notes: Counter[str] = Counter()

    def text(self, text: str) -> Tokens:
        """Encode a document: every token is trained on."""
        return self.completion("", text)

    def completion(self, prompt: str, completion: str) -> Tokens:
        """Encode a prompt and its completion: the completion and the end are trained on."""
        tokenize = self.tokenizer.tokenize
        context = [self.tokenizer.bos, *tokenize(prompt)]
        answer = [*tokenize(completion), self.tokenizer.eos]
        return _joined([(context, False), (answer, True)])

    def chat(self, chat: Chat) -> list[Tokens]:
        """Encode a conversation as bos, then role, content and eos of each message."""
        markers = {role: getattr(self.tokenizer, role) for role in ("system", "user", "assistant")}
        hugging_face = "use --tokenizer-type HuggingFaceTokenizer"
        calls = ["tool_calls"] if any("tool_calls" in m for m in chat.messages) else []
        if given := [*(["tools"] if chat.tools else []), *chat.variables, *calls]:
            raise ValueError(
                f"the byte tokenizer takes no {given}: leave it out, or {hugging_face}"
            )
        pieces = [([self.tokenizer.bos], False)]
        answers = set(chat.answers)
        for number, message in enumerate(chat.messages):
            role = message["role"]
            if role not in markers:
                raise ValueError(
                    f"messages has the role {role!r}, the byte tokenizer knows {list(markers)}: "
                    f"rename the role or {hugging_face}"
                )
            content = [*self.tokenizer.tokenize(message["content"]), self.tokenizer.eos]
            pieces += [([markers[role]], False), (content, number in answers)]
        return [_joined(pieces)]

    def unread_keys(self, chat: Chat) -> set[str]:
        """Return the keys of messages that no token comes from."""
        return _keys(chat)

    def prompt(self, content: str | Chat) -> list[int]:
        """Encode what an answer is sampled behind: of a chat, to the assistant's role."""
        if isinstance(content, str):
            return [self.tokenizer.bos, *self.tokenizer.tokenize(content)]
        return [*self.chat(content)[0].ids, self.tokenizer.assistant]

    def stops(self, content: str | Chat) -> set[int]:
        """Return the token that ends an answer."""
        return {self.tokenizer.eos}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        return self.tokenizer.detokenize(ids)


class HuggingFaceEncoder:
    """Encoder of a Hugging Face tokenizer; chats go through its own chat template."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        self.notes = self._template.notes
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "tokenizer_model has no end-of-text token: set eos_token in tokenizer_config.json"
            )
        pad_id = tokenizer.pad_token_id
        self.pad_id: int = tokenizer.eos_token_id if pad_id is None else pad_id
        starts_with_bos = tokenizer.bos_token_id in tokenizer("").input_ids
        self._bos: list[int] = [tokenizer.bos_token_id] if starts_with_bos else []

    def text(self, text: str) -> Tokens:
        """Encode a document between start and end tokens: every token is trained on."""
        return self._closed(self._spans(text, [(0, len(text))]))

    def completion(self, prompt: str, completion: str) -> Tokens:
        """Encode a prompt and its completion: the completion and the end are trained on."""
        text = prompt + completion
        return self._closed(self._spans(text, [(len(prompt), len(text))]))

    def chat(self, chat: Chat) -> list[Tokens]:
        """Encode a conversation by the chat template, in as few examples as are exact."""
        return [self._spans(text, spans) for text, spans in self._template.examples(chat)]

    def unread_keys(self, chat: Chat) -> set[str]:
        """Return the keys of messages that no token comes from."""
        return {key for key in _keys(chat) if not self._template.reads(key)}

    def prompt(self, content: str | Chat) -> list[int]:
        """Encode what an answer is sampled behind: of a chat, with the generation prompt."""
        if isinstance(content, str):
            return [*self._bos, *self._ids(content)]
        return self._ids(self._template.prompt(content))

    def stops(self, content: str | Chat) -> set[int]:
        """Return the end of text, and for a chat the token that its template ends a turn with."""
        found = {self.tokenizer.eos_token_id}
        end = "" if isinstance(content, str) else self._template.end_of_turn(content)
        return found | {self.tokenizer.added_tokens_encoder[end]} if end else found

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _spans(self, text: str, spans: list[tuple[int, int]]) -> Tokens:
        """Encode `text`; tokens that begin in one of `spans` (in characters) are trained on."""
        if not self.tokenizer.is_fast:
            return _joined(_cut(text, spans, lambda piece: self._ids(piece)))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded.offset_mapping]
        trained = [any(low <= start < high for low, high in spans) for start in starts]
        return Tokens(list(encoded.input_ids), trained)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _closed(self, tokens: Tokens) -> Tokens:
        eos = [self.tokenizer.eos_token_id]
        return _joined([(self._bos, False), tokens, (eos, True)])


class MegatronEncoder:
    """Encoder of Megatron's other tokenizers (SentencePiece, Tiktoken): text and completions."""

    def __init__(self, tokenizer: MegatronTokenizer) -> None:
        self.tokenizer = tokenizer
        pad_id = getattr(tokenizer, "pad", None)
        self.pad_id: int = tokenizer.eod if pad_id is None or pad_id < 0 else pad_id
        self.notes: Counter[str] = Counter()

    def text(self, text: str) -> Tokens:
        """Encode a document and its end: every token is trained on."""
        return self.completion("", text)

    def completion(self, prompt: str, completion: str) -> Tokens:
        """Encode a prompt and its completion: the completion and the end are trained on."""
        tokenize = self.tokenizer.tokenize
        answer = [*tokenize(completion), self.tokenizer.eod]
        return _joined([(tokenize(prompt) if prompt else [], False), (answer, True)])

    def chat(self, chat: Chat) -> NoReturn:
        """Refuse: only Hugging Face and byte tokenizers mark what the assistant says."""
        raise ValueError(
            f"dataset has `messages`, which {type(self.tokenizer).__name__} cannot mark: use "
            "--tokenizer-type HuggingFaceTokenizer, or columns `prompt` and `completion`"
        )

    def unread_keys(self, chat: Chat) -> set[str]:
        """Return the keys of messages that no token comes from."""
        return _keys(chat)

    def prompt(self, content: str | Chat) -> list[int]:
        """Encode what an answer is sampled behind."""
        return self.tokenizer.tokenize(content) if isinstance(content, str) else self.chat(content)

    def stops(self, content: str | Chat) -> set[int]:
        """Return the token that ends an answer."""
        return {self.tokenizer.eod}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of an answer."""
        return self.tokenizer.detokenize(list(ids))


def encoder_for(tokenizer: Tokenizer) -> Encoder:
    """Return the encoder of a byte, a Hugging Face or a Megatron tokenizer."""
    if isinstance(tokenizer, ByteTokenizer):
        return ByteEncoder(tokenizer)
    # NOTE: Megatron's HuggingFaceTokenizer keeps the real one two levels down, and its own
    # `tokenize` adds start and end tokens that would fall between prompt and completion.
    inner = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    for candidate in (tokenizer, inner):
        if callable(candidate) and hasattr(candidate, "convert_tokens_to_ids"):
            return HuggingFaceEncoder(cast(HuggingFaceTokenizer, candidate))
    return MegatronEncoder(cast(MegatronTokenizer, tokenizer))


def _keys(chat: Chat) -> set[str]:
    """Return the keys of messages beside those that every encoder reads, or refuses."""
    known = {"role", "content", "weight", "tool_calls"}
    return {key for message in chat.messages for key in message} - known


def _joined(pieces: Sequence[tuple[list[int], bool | list[bool]]]) -> Tokens:
    ids, trained = [], []
    for piece, mark in pieces:
        ids += piece
        trained += [mark] * len(piece) if isinstance(mark, bool) else mark
    return Tokens(ids, trained)


def _cut(
    text: str, spans: list[tuple[int, int]], encode: Callable[[str], list[int]]
) -> list[tuple[list[int], bool]]:
    """Encode `text` piece by piece, inside and outside of `spans`."""
    pieces, at = [], 0
    for low, high in spans:
        pieces += [(encode(text[at:low]), False), (encode(text[low:high]), True)]
        at = high
    return [*pieces, (encode(text[at:]), False)]
