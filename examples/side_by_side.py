"""Ask a base and its adapter the same questions, through transformers and peft.

python examples/side_by_side.py --model DIR --adapter DIR "What is a heap?" ["..."]

Greedy, with a key-value cache, in float32, all questions in one batch.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase


def main() -> None:
    """Print the answers, or write them to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", type=Path, required=True, help="Hugging Face directory of the base")
    add("--adapter", type=Path, required=True, help="PEFT directory of the adapter")
    add("--num-tokens", type=int, default=100, help="longest answer (default 100)")
    add("--result", type=Path, help="JSON file to write the answers to")
    add("questions", nargs="+", metavar="QUESTION")
    options = parser.parse_args()
    for path in (options.model / "config.json", options.adapter / "adapter_config.json"):
        if not path.is_file():
            parser.error(f"{path.parent} has no {path.name}: give the directory that has it")
    answers = ask_both(options.model, options.adapter, options.questions, options.num_tokens)
    if options.result:
        options.result.write_text(json.dumps(answers, indent=1, ensure_ascii=False))
        return
    for question, base, adapter in zip(options.questions, *answers.values(), strict=True):
        print(f"{question}\n  base     {base!r}\n  adapter  {adapter!r}")


def ask_both(
    model_directory: Path, adapter: Path, questions: Sequence[str], num_tokens: int
) -> dict[str, list[str]]:
    """Return the answers of `base` and of `adapter`, in the order of the questions."""
    # Slow to import; wrong usage is told before.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()
    base = ask(model, tokenizer, questions, num_tokens)
    # It puts the adapter into `model` itself, so the base answers first.
    adapted = PeftModel.from_pretrained(model, adapter).eval()
    return {"base": base, "adapter": ask(adapted, tokenizer, questions, num_tokens)}


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerBase":
    """Return a model's tokenizer, which pads before the questions, so that answers follow them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@torch.inference_mode()
def ask(
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Sequence[str],
    num_tokens: int,
) -> list[str]:
    """Return the most likely answers of a model, each of at most so many tokens."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    given: BatchEncoding = tokenizer.apply_chat_template(  # type: ignore[assignment]
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    said = model.generate(
        **given, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    new = said[:, given["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


if __name__ == "__main__":
    main()
