"""Train a small MoE from scratch, fine-tune it by LoRA on 4 processes, hand it to Hugging Face.

python examples/demo.py --output demo

Everything runs on the CPU: the base learns the source and documentation of Python's standard
library; the adapter learns to answer what a function does with its docstring.
"""

import argparse
import json
import shutil
from pathlib import Path

from launching import TRAIN, VERIFY, Interval, curve, launch, print_table, step

# A Qwen3-MoE in shape: grouped queries, q/k norm, SwiGLU experts, 16 of them, 4 active.
MODEL = """
--num-layers 4 --hidden-size 192 --ffn-hidden-size 512 --max-position-embeddings 256
--num-attention-heads 6 --group-query-attention --num-query-groups 2 --kv-channels 32
--qk-layernorm --normalization RMSNorm --swiglu --disable-bias-linear
--position-embedding-type rope --rotary-base 10000 --untie-embeddings-and-output-weights
--num-experts 16 --moe-router-topk 4 --moe-ffn-hidden-size 96
--moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss
--moe-aux-loss-coeff 1e-3 --make-vocab-size-divisible-by 64
--attention-dropout 0 --hidden-dropout 0
"""
TRAINING = """
--cpu --byte-tokenizer --seq-length 256 --log-interval 10 --eval-iters 4 --eval-interval 1000
--save-interval 100000 --adam-beta2 0.95 --calculate-per-token-loss
"""
PRETRAIN = """
--dataset stdlib-text --micro-batch-size 4 --global-batch-size 32 --lr 4e-3 --min-lr 4e-4
--lr-decay-style cosine --lr-warmup-iters 10 --no-save-optim --no-save-rng
"""
# The article's recipe is the default: all layers and the unembedding, alpha 32, constant rate.
FINETUNE = """
--dataset stdlib-docstrings --micro-batch-size 4 --global-batch-size 32 --lr 4e-3
--lr-decay-style constant --weight-decay 0 --lora-rank 16
--tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2
--expert-tensor-parallel-size 1
"""


def main() -> None:
    """Run the demonstration and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"), help="directory to write to")
    parser.add_argument("--pretrain-iters", type=int, default=160)
    parser.add_argument("--finetune-iters", type=int, default=60)
    parser.add_argument(
        "--quarter", action="store_true", help="a quarter of the iterations, to see that it works"
    )
    options = parser.parse_args()
    if options.quarter:
        options.pretrain_iters, options.finetune_iters = 40, 15
    out = options.output.resolve()
    out.mkdir(parents=True, exist_ok=True)
    base, checkpoint, adapter = (
        out / f"base-{options.pretrain_iters}",
        out / "lora",
        out / "adapter",
    )
    if any(out.iterdir()) and not (out / "pretrain.log").exists():
        parser.error(f"--output {out} holds something else: give a new directory")
    for made_before in (checkpoint, adapter, out / "base-hf"):
        shutil.rmtree(made_before, ignore_errors=True)

    step("1/4  Train the base from scratch: 2 processes, the text of Python's standard library")
    pretrain_log = out / "pretrain.log"
    if not (base / "latest_checkpointed_iteration.txt").exists():
        flags = [*words(PRETRAIN), "--train-iters", options.pretrain_iters, "--save", base]
        launch(2, TRAIN, [*words(MODEL + TRAINING), *flags], pretrain_log)

    step("2/4  Fine-tune by LoRA: 4 processes, TP 2 with sequence parallelism, EP 2, DP 2")
    finetune_log = out / "finetune.log"
    flags = [*words(FINETUNE), "--train-iters", options.finetune_iters]
    flags += ["--pretrained-checkpoint", base, "--save", checkpoint, "--export-hf", adapter]
    launch(4, TRAIN, [*words(MODEL + TRAINING), *flags], finetune_log)

    step("3/4  Load base and adapter with transformers and peft, compare with Megatron")
    facts = out / "verify.json"
    flags = [*words(MODEL + TRAINING), "--dataset", "stdlib-docstrings"]
    flags += ["--micro-batch-size", 1, "--lora-rank", 16]
    flags += ["--pretrained-checkpoint", base, "--lora-load", checkpoint, "--adapter", adapter]
    flags += ["--hf-base", out / "base-hf", "--hf-family", "qwen3_moe", "--result", facts]
    launch(1, VERIFY, flags, out / "verify.log")

    step("4/4  Result")
    found = json.loads(facts.read_text())
    report(out, found, pretrain_log, finetune_log)
    if not found["lora_loss"] < found["base_loss"]:
        raise SystemExit("error: fine-tuning did not lower the loss on held-out answers")


def report(out: Path, facts: dict, pretrain_log: Path, finetune_log: Path) -> None:
    """Print the table and draw the loss curves."""
    steps = curve(finetune_log)
    # The first interval has the warm-up of every process in it.
    per_second = [1000 / interval.milliseconds for interval in steps[1:]]
    speed = sorted(per_second)[len(per_second) // 2] if per_second else float("nan")
    adapter_bytes = sum(path.stat().st_size for path in (out / "adapter").iterdir())
    trained, all_ = facts["lora_parameters"], facts["base_parameters"]
    rows = {
        "loss on held-out answers, base": f"{facts['base_loss']:.3f} nats per byte",
        "loss on held-out answers, fine-tuned": f"{facts['lora_loss']:.3f} nats per byte",
        "parameters of the base": f"{all_:,}",
        "trained by LoRA": f"{trained:,} ({trained / all_:.1%})",
        "exported adapter": f"{adapter_bytes / 2**20:.1f} MiB in {out / 'adapter'}",
        "steps per second, 4 processes": f"{speed:.2f}",
        "logits, peft against Megatron": f"relative error {facts['error']:.1e}",
        "the same with one lora_B negated": f"relative error {facts['control']:.1e}",
        "loss curves": str(out / "loss.png"),
    }
    draw({"base": curve(pretrain_log), "LoRA": steps}, out / "loss.png")
    print_table(rows)


def draw(curves: dict[str, list[Interval]], path: Path) -> None:
    """Draw the training losses, each over its own iterations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(curves), figsize=(9, 3.5), constrained_layout=True)
    titles = {"base": "base, from scratch", "LoRA": "LoRA, answers only"}
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        axis.plot([p.iteration for p in points], [p.loss for p in points])
        axis.set(title=titles[name], xlabel="iteration", ylabel="loss (nats per byte)")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def words(flags: str) -> list[str]:
    """Split flags at white space."""
    return flags.split()


if __name__ == "__main__":
    main()
