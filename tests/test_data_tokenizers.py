"""Tokenizers: what is trained on, with the byte tokenizer and with real Hugging Face ones."""

from types import SimpleNamespace

import pytest

from megalora.data.chats import Chat, Message
from megalora.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceEncoder,
    MegatronEncoder,
    Tokens,
    encoder_for,
)
from tests.support.chat_templates import (
    CHAT,
    CHATML,
    hugging_face_tokenizer,
    trained_text,
)

# As Qwen3's: the last answer begins with an empty thought, which earlier ones lose.
THINKING = CHATML.replace(
    "\n{{ m.content }}",
    "\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}",
)


def chat(messages: list[Message] = CHAT, tools=(), **variables) -> Chat:
    return Chat([dict(message) for message in messages], list(tools), variables)


def test_byte_tokenizer_gives_back_any_text() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.detokenize(tokenizer.tokenize("naïve ∑\n\t日本")) == "naïve ∑\n\t日本"
    assert max(tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.assistant) < 262
    assert tokenizer.vocab_size == 262


def test_byte_completion_trains_on_the_answer_and_the_end() -> None:
    tokens = encoder_for(ByteTokenizer()).completion("ab", "cd")
    assert tokens.ids == [256, 97, 98, 99, 100, 257]
    assert tokens.trained == [False, False, False, True, True, True]


def test_byte_text_trains_on_everything_behind_its_start() -> None:
    tokens = encoder_for(ByteTokenizer()).text("ab")
    assert tokens.ids == [256, 97, 98, 257]
    assert tokens.trained == [False, True, True, True]


def test_byte_chat_trains_on_what_the_assistant_says() -> None:
    (tokens,) = encoder_for(ByteTokenizer()).chat(chat())
    assert trained_text(ByteTokenizer(), tokens) == "Hello!Good bye."
    assert sum(tokens.trained) == len("Hello!Good bye.") + 2  # and on each end
    assert tokens.ids.count(ByteTokenizer.assistant) == 2


def test_byte_chat_refuses_a_role_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"role 'tool', the byte tokenizer knows .*system"):
        encoder_for(ByteTokenizer()).chat(chat([{"role": "tool", "content": "x"}]))


def test_chat_template_trains_on_what_the_assistant_says() -> None:
    tokenizer = hugging_face_tokenizer()
    (tokens,) = encoder_for(tokenizer).chat(chat())
    assert trained_text(tokenizer, tokens) == "Hello!<|im_end|>Good bye.<|im_end|>"
    assert tokenizer.decode(tokens.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_tokens_of_a_chat_are_those_of_the_whole_text() -> None:
    tokenizer = hugging_face_tokenizer()
    (tokens,) = encoder_for(tokenizer).chat(chat())
    assert tokens.ids == tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert len(tokens.ids) < len(tokenizer.decode(tokens.ids))  # the BPE merges


def test_a_template_that_rewrites_earlier_answers_gives_one_example_for_each() -> None:
    tokenizer = hugging_face_tokenizer(THINKING)
    first, second = encoder_for(tokenizer).chat(chat())
    assert trained_text(tokenizer, first) == "<think></think>Hello!<|im_end|>"
    assert trained_text(tokenizer, second) == "<think></think>Good bye.<|im_end|>"
    assert "assistant\nHello!" in tokenizer.decode(second.ids)


def test_an_answer_without_a_question_is_context() -> None:
    tokenizer = hugging_face_tokenizer()
    (tokens,) = encoder_for(tokenizer).chat(chat(CHAT[2:]))
    assert trained_text(tokenizer, tokens) == "Good bye.<|im_end|>"


def test_a_template_whose_generation_prompt_fits_no_answer_is_refused() -> None:
    template = CHATML.replace("assistant\n{% endif", "bot\n{% endif")
    with pytest.raises(ValueError, match=r"chat template is not usable.*give another --chat"):
        encoder_for(hugging_face_tokenizer(template)).chat(chat())


def test_messages_without_a_chat_template_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no chat template: give --chat-template"):
        encoder_for(hugging_face_tokenizer(None)).chat(chat())


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no end-of-text token: set eos_token"):
        encoder_for(hugging_face_tokenizer(eos=False))


@pytest.mark.parametrize("bos", [False, True])
def test_completion_begins_as_the_tokenizer_begins(bos: bool) -> None:
    tokenizer = hugging_face_tokenizer(bos=bos)
    tokens = encoder_for(tokenizer).completion("Hello? ", "Good bye.")
    assert tokenizer.decode(tokens.ids) == "<|bos|>" * bos + "Hello? Good bye.<|eos|>"
    assert trained_text(tokenizer, tokens) == "Good bye.<|eos|>"


def test_a_token_over_the_boundary_belongs_to_the_prompt() -> None:
    tokenizer = hugging_face_tokenizer()
    whole = tokenizer("Hello").input_ids
    assert len(whole) == 1
    tokens = encoder_for(tokenizer).completion("Hel", "lo")
    assert tokens.ids[0] == whole[0]
    assert tokens.trained == [False, True]


def test_a_slow_tokenizer_is_encoded_piece_by_piece() -> None:
    tokenizer = hugging_face_tokenizer()

    class Slow:
        is_fast = False
        eos_token_id, pad_token_id, bos_token_id = 1, None, None

        def __call__(self, text: str, **_: object):
            return tokenizer(text)

    tokens = HuggingFaceEncoder(Slow()).completion("Hello? ", "Good bye.")
    assert trained_text(tokenizer, tokens) == "Good bye.<|eos|>"


def test_padding_without_a_pad_token_is_the_end_token() -> None:
    assert encoder_for(hugging_face_tokenizer()).pad_id == 1


def test_megatrons_wrapper_of_a_hugging_face_tokenizer_is_seen_through() -> None:
    tokenizer = hugging_face_tokenizer()
    wrapper = SimpleNamespace(_tokenizer=SimpleNamespace(tokenizer=tokenizer))
    encoder = encoder_for(wrapper)
    assert isinstance(encoder, HuggingFaceEncoder)
    assert encoder.tokenizer is tokenizer


def test_megatrons_other_tokenizers_encode_completions_but_no_chats() -> None:
    encoder = encoder_for(SimpleNamespace(tokenize=lambda text: list(text.encode()), eod=5, pad=-1))
    assert isinstance(encoder, MegatronEncoder)
    assert encoder.pad_id == 5
    assert encoder.completion("a", "b") == Tokens([97, 98, 5], [False, True, True])
    with pytest.raises(ValueError, match=r"cannot mark: use --tokenizer-type HuggingFace"):
        encoder.chat(chat())
