"""Draw what a run of examples/rl_lora.py printed: rewards, and how far the policy went.

python benchmarks/rl_curve.py LOG --output docs/rl/larger   # writes larger.json and larger.png
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib as mpl
from _results import write_text

mpl.use("agg")
import matplotlib.pyplot as plt

LINE = re.compile(r"^(iteration|evaluation after) (\d+)(?:/\d+)? \| (.*)$", re.MULTILINE)

type Metrics = dict[str, float]


def read_log(text: str) -> dict[str, dict[int, Metrics]]:
    """Return the metrics of each iteration and of each evaluation, by its number."""
    found: dict[str, dict[int, Metrics]] = {"iteration": {}, "evaluation after": {}}
    for kind, number, metrics in LINE.findall(text):
        pairs = (pair.rsplit(": ", 1) for pair in metrics.split(" | "))
        found[kind][int(number)] = {name: float(value) for name, value in pairs}
    if not found["iteration"]:
        raise SystemExit("the log has no line of an iteration: give what rl_lora.py printed")
    return found


def draw(runs: dict[str, dict[int, Metrics]], path: Path) -> None:
    """Draw rewards above, the divergence from the base below, by iteration."""
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(6, 5), layout="constrained")
    iterations, evaluations = runs["iteration"], runs["evaluation after"]
    above.plot(list(iterations), [m["reward/mean"] for m in iterations.values()], label="sampled")
    if evaluations:
        rewards = [m["reward/mean"] for m in evaluations.values()]
        above.plot(list(evaluations), rewards, "o", label="held out")
    above.set(ylabel="reward, mean", ylim=(0, None))
    above.legend(loc="lower right")
    below.plot(list(iterations), [m["kl/base"] for m in iterations.values()])
    below.set(ylabel="KL from the base (nats)", xlabel="iteration")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Read a log; write its numbers and its picture."""
    parser = argparse.ArgumentParser(description="draw what a run printed")
    parser.add_argument("log", type=Path, help="what the run printed")
    parser.add_argument("--output", type=Path, required=True, help="path without its ending")
    options = parser.parse_args()
    runs = read_log(options.log.read_text())
    write_text(options.output.with_suffix(".json"), json.dumps(runs, indent=1) + "\n")
    draw(runs, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
