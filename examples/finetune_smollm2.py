"""Fine-tune SmolLM2-135M, a real pretrained model, by LoRA on two processes, and let it answer.

python examples/finetune_smollm2.py --output build/real

Everything runs on the CPU. The model learns to answer questions about the functions of Python's
standard library in JSON; it is asked about functions that it was not trained on, before and after.
"""

import argparse
import json
import resource
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import launching
import library_chats
import smollm2
from launching import step
from library_chats import Function, in_style

SIDE_BY_SIDE = launching.EXAMPLES / "side_by_side.py"
DEFAULT_MODEL = launching.EXAMPLES.parent / "build" / "smollm2"
NUM_PROCESSES = 2
# Nine heads allow TP 3 or none; of two stages one waits for the other.
DATA = "--cpu --seq-length 256 --tokenizer-type HuggingFaceTokenizer --lora-rank 16"
# The article's recipe is the default: all layers and the unembedding, alpha 32, constant rate.
TRAINING = """
--micro-batch-size 2 --global-batch-size 4 --calculate-per-token-loss --weight-decay 0
--lr auto --lr-decay-style constant --log-interval 2 --save-interval 100000
--no-save-optim --no-save-rng
"""
# Batches in one evaluation: about as many rows as the held-out chats fill.
EVAL_ITERS = 5
NUM_ASKED, NUM_SHOWN = 12, 3
NUM_TOKENS = 100


def main() -> None:
    """Read the command line, fine-tune, and end with 1 where nothing was learned."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/real"), help="directory to write to")
    add("--iters", type=int, default=40, help="iterations of four rows of 256 tokens (default 40)")
    add("--model", type=Path, help="a Hugging Face directory (default: SmolLM2's, written once)")
    options = parser.parse_args()
    try:
        out, model = check(options.output, options.iters, options.model)
    except ValueError as error:
        parser.error(str(error))
    facts = fine_tune(out, model, options.iters)
    if not facts["lora_loss"] < facts["base_loss"]:
        raise SystemExit("error: fine-tuning did not lower the loss on held-out answers")


def fine_tune(out: Path, model: Path, iters: int) -> dict[str, float]:
    """Fine-tune, compare, ask, print the table; return the losses and errors."""
    start = time.monotonic()
    train, held_out = library_chats.functions()
    step(f"1/4  Chats about {len(train)} functions of Python's library, {len(held_out)} held out")
    data = write_data(out / "chats.jsonl", train, held_out, model)

    step(f"2/4  Fine-tune by LoRA: {NUM_PROCESSES} processes, {iters} iterations")
    log, before = out / "finetune.log", time.monotonic()
    launching.launch(NUM_PROCESSES, launching.TRAIN, data + training(iters, out), log)
    seconds = time.monotonic() - before
    # Of the largest process that has ended, in KiB.
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20

    step("3/4  Load base and adapter with transformers and peft, compare with Megatron")
    facts = verify(out, data)

    step(f"4/4  Ask base and adapter about {NUM_ASKED} of the held-out functions")
    asked = held_out[:NUM_ASKED]
    answers = ask(out, model, [function.question() for function in asked])

    step("Result")
    draw(log, facts, out / "loss.png")
    rows = table(facts, answers, asked)
    rows["exported adapter"] = adapter_size(out / "adapter")
    rows["peak memory of a process"] = f"{peak:.1f} GiB"
    rows["time"] = f"{time.monotonic() - start:.0f} s, {seconds:.0f} s of it the fine-tuning"
    rows["loss curves"] = str(out / "loss.png")
    launching.print_table(rows)
    show(answers, asked[:NUM_SHOWN])
    return facts


def check(output: Path, iters: int, model: Path | None) -> tuple[Path, Path]:
    """Return the output's and the model's directory, emptied and written where that is needed.

    Raises ValueError for what cannot be right.
    """
    if iters < 1:
        raise ValueError(f"--iters {iters} trains nothing: give 1 or more")
    if model is not None and not (model / "config.json").is_file():
        raise ValueError(f"--model {model} has no config.json: give a Hugging Face directory")
    out = output.resolve()
    if out.is_file() or (
        out.is_dir() and any(out.iterdir()) and not (out / "chats.jsonl").exists()
    ):
        raise ValueError(f"--output {output} holds something else: give a new directory")
    if model is None and not (DEFAULT_MODEL / "config.json").is_file():
        smollm2.write(DEFAULT_MODEL)
    out.mkdir(parents=True, exist_ok=True)
    for made_before in (out / "lora", out / "adapter"):
        shutil.rmtree(made_before, ignore_errors=True)
    return out, (model or DEFAULT_MODEL).resolve()


def write_data(
    path: Path, train: Sequence[Function], held_out: Sequence[Function], model: Path
) -> list[object]:
    """Write the chats, those held out last; return the flags that name model and data."""
    library_chats.write(path, [*train, *held_out])
    splits = [f"train[:{len(train)}]", f"train[{len(train)}:]"]
    flags = [*DATA.split(), "--hf-model", model, "--tokenizer-model", model, "--dataset", path]
    return [*flags, "--dataset-split", splits[0], "--dataset-valid-split", splits[1]]


def training(iters: int, out: Path) -> list[object]:
    """Return the flags of the training itself."""
    flags = [*TRAINING.split(), "--train-iters", iters, "--save", out / "lora"]
    # Four times; the last one is Megatron's own, at the end.
    flags += ["--eval-interval", iters // 4 + 1, "--eval-iters", EVAL_ITERS]
    return [*flags, "--export-hf", out / "adapter"]


def verify(out: Path, data: Sequence[object]) -> dict[str, float]:
    """Return losses, sizes and errors of base and adapter, in float32; end where logits differ."""
    result = out / "verify.json"
    flags = [*data, "--micro-batch-size", 1, "--lora-load", out / "lora"]
    flags += ["--adapter", out / "adapter", "--result", result]
    launching.launch(1, launching.VERIFY, flags, out / "verify.log")
    return json.loads(result.read_text())


def ask(out: Path, model: Path, questions: Sequence[str]) -> dict[str, list[str]]:
    """Return the answers of `base` and `adapter`."""
    result = out / "answers.json"
    flags = ["--model", model, "--adapter", out / "adapter", "--num-tokens", NUM_TOKENS]
    flags += ["--result", result, *questions]
    launching.run([SIDE_BY_SIDE, *flags], out / "answers.log")
    return json.loads(result.read_text())


def table(
    facts: Mapping[str, float], answers: Mapping[str, Sequence[str]], asked: Sequence[Function]
) -> dict[str, str]:
    """Return what was learned, and that both sides agree, as lines of the table."""
    right = {
        who: sum(in_style(*pair) for pair in zip(said, asked, strict=True))
        for who, said in answers.items()
    }
    trained, all_ = facts["lora_parameters"], facts["base_parameters"]
    return {
        "loss on held-out answers, base": f"{facts['base_loss']:.3f} nats per token",
        "loss on held-out answers, fine-tuned": f"{facts['lora_loss']:.3f} nats per token",
        "right JSON, base": f"{right['base']} of {len(asked)} held-out functions",
        "right JSON, fine-tuned": f"{right['adapter']} of {len(asked)} held-out functions",
        "parameters of the base": f"{all_:,}",
        "trained by LoRA": f"{trained:,} ({trained / all_:.1%})",
        "logits, peft against Megatron": f"relative error {facts['error']:.1e}",
        "the same with one lora_B negated": f"relative error {facts['control']:.1e}",
    }


def adapter_size(directory: Path) -> str:
    """Return how much an adapter takes on the disk."""
    size = sum(path.stat().st_size for path in directory.iterdir())
    return f"{size / 2**20:.1f} MiB in {directory}"


def show(answers: Mapping[str, Sequence[str]], asked: Sequence[Function]) -> None:
    """Print answers side by side, each in one line."""
    for number, function in enumerate(asked):
        print(f"\n  {function.question()}")
        for who, said in answers.items():
            text = " ".join(said[number].split())
            print(f"    {who:<8} {text[:240]}{' ...' if len(text) > 240 else ''}", flush=True)


def draw(log: Path, facts: Mapping[str, float], path: Path) -> None:
    """Draw the loss of training and, from the base on, of the held-out answers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = launching.curve(log)
    held_out = {0: facts["base_loss"], **launching.held_out_curve(log)}
    figure, axis = pyplot.subplots(figsize=(6, 3.5), constrained_layout=True)
    axis.plot([s.iteration for s in steps], [s.loss for s in steps], label="training")
    axis.plot(list(held_out), list(held_out.values()), "o--", label="held out")
    axis.set(title="LoRA, answers only", xlabel="iteration", ylabel="loss (nats per token)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
