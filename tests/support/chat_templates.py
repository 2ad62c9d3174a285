"""Small chats, templates for them, and a Hugging Face tokenizer that has one."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megalora.data.chats import read_chat
from megalora.data.tokenizers import (
    HuggingFaceEncoder,
    Tokens,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama's, Qwen's and DeepSeek's: how tools, and the arguments of a call, are written.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>{{ call.function.name }} ARGUMENTS</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
AS_JSON = WITH_TOOLS.replace("ARGUMENTS", "{{ call.function.arguments | tojson }}")
AS_TEXT = WITH_TOOLS.replace("ARGUMENTS", "{{ '```' + call.function.arguments + '```' }}")
CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Good bye."},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
CALLED = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]


def hugging_face_tokenizer(template: str | None = CHATML, bos: bool = False, eos: bool = True):
    """Return a small byte-level BPE, trained on the chat itself so that it does merge."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([m["content"] for m in CHAT] * 4, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|bos|>",
        eos_token="<|eos|>" if eos else None,
        chat_template=template,
    )


def trained_text(tokenizer, tokens: Tokens) -> str:
    ids = [i for i, trained in zip(*tokens, strict=True) if trained]
    return tokenizer.decode(ids) if hasattr(tokenizer, "decode") else tokenizer.detokenize(ids)


def encoder(template: str = AS_JSON) -> HuggingFaceEncoder:
    return HuggingFaceEncoder(hugging_face_tokenizer(template))


def texts(row: dict, template: str = AS_JSON) -> list[str]:
    """Return the texts of a row's examples."""
    own = encoder(template)
    return [own.tokenizer.decode(tokens.ids) for tokens in own.chat(read_chat(row, "messages"))]


def trained(row: dict, template: str = AS_JSON) -> list[str]:
    own = encoder(template)
    return [trained_text(own.tokenizer, t) for t in own.chat(read_chat(row, "messages"))]
