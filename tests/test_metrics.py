"""What Megatron's writers are given of a run of adapters: loss, rate, and what happens inside."""

import math
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forked import Ranks
from tests.support.tiny import LORA, flags, train

# Of LevelDB's logs: the size of a block, and kinds of parts of a record.
BLOCK, WHOLE, LAST = 32768, 1, 4
RATES = [0.005, 0.01, 0.01]
# At the hidden size of 64, with alpha 32 and a rate of B that is 4 times that of A.
RATIO, INIT = 4.0, 1 / math.sqrt(64)
# Rows of the unembedding that are no padding.
TOKENS, RANK = 255, 8
NAMES = ["norm-A", "norm-B", "spectral-A", "spectral-B", "B-above-A"]
NAMES += ["update", "update-spectral", "update-largest", "start", "steps"]
BASIS = {"start": [32 * INIT * RATIO * r for r in RATES], "steps": [INIT / r for r in RATES]}


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranks, Path]:
    """Three steps in two stages, of which the first has nothing to train."""
    directory = tmp_path_factory.mktemp("metrics")
    writers = ["--tensorboard-dir", directory / "tensorboard", "--lr-warmup-iters", 2]
    writers += ["--lora-log-interval", 1, "--lora-lr-ratio", RATIO]
    writers += ["--wandb-project", "adapters", "--wandb-exp-name", "three-steps"]
    writers += ["--wandb-save-dir", directory / "wandb"]
    more = ["--pretrained-checkpoint", base, *LORA, "--lora-targets", "unembed", *flags("pp2")]
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    ranks = train(2, directory / "run", *more, *writers, iters=3, env=env)
    return ranks.succeed(), directory


def printed(ranks: Ranks) -> dict[int, float]:
    """Return the losses of Megatron's lines, without the second: it is a mean of two steps."""
    return {step: loss for step, loss in ranks.losses().items() if step != 2}


def test_tensorboard_gets_the_loss_and_the_learning_rate(run: tuple[Ranks, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ranks, directory = run
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("lm loss")}
    assert sorted(losses) == [1, 2, 3]
    assert {step: losses[step] for step in (1, 3)} == pytest.approx(printed(ranks), rel=1e-5)
    rates = [event.value for event in events.Scalars("learning-rate")]
    assert rates == pytest.approx(RATES)


def test_tensorboard_gets_what_happens_inside_the_adapters(run: tuple[Ranks, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ranks, directory = run
    events = EventAccumulator(str(directory / "tensorboard"))
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("lora/")]
    found = {name.removeprefix("lora/"): [e.value for e in events.Scalars(name)] for name in names}
    assert found.keys() == {f"{name}/{kind}" for name in NAMES for kind in ("output_layer", "all")}
    for name, expected in BASIS.items():
        assert found[f"{name}/output_layer"] == pytest.approx(expected)
    # The first step is at a rate of 0; by the next, Adam moves B's elements by up to its rate.
    first, second, third = found["norm-B/output_layer"]
    assert first == 0 < second < third
    assert 0.5 < second / (RATIO * RATES[0] * math.sqrt(TOKENS * RANK)) < 1
    update = found["update/output_layer"]
    lines = re.findall(
        r"^lora after iteration (\d) \| \|c B A\| / \|W\|: (\S+),", ranks.text(), re.M
    )
    assert {int(step): float(number) for step, number in lines} == pytest.approx(
        dict(enumerate(update, 1)), rel=1e-2
    )


def test_weights_and_biases_gets_the_same_offline(run: tuple[Ranks, Path]) -> None:
    ranks, directory = run
    (file,) = (directory / "wandb").glob("**/*.wandb")
    rows: dict[int, dict[str, float]] = {}
    for step, name, value in history(file):
        rows.setdefault(step, {})[name] = value
    losses = {step: row["lm loss"] for step, row in rows.items() if step != 2}
    assert losses == pytest.approx(printed(ranks), rel=1e-5)
    assert [row["learning-rate"] for row in rows.values()] == pytest.approx(RATES)
    assert [row["lora/start/all"] for row in rows.values()] == pytest.approx(BASIS["start"])


def history(file: Path) -> Iterator[tuple[int, str, float]]:
    """Yield step, name and value of what was logged offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in blocks(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or item.nested_key[0]
            if name in ("lm loss", "learning-rate", "lora/start/all"):
                yield record.history.step.num, name, float(item.value_json)


def blocks(data: bytes) -> Iterator[bytes]:
    """Yield the records of a LevelDB log, behind a header of 7 bytes."""
    place, parts = 7, []
    while place + 7 <= len(data):
        if (left := BLOCK - place % BLOCK) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts.append(data[place + 7 : place + 7 + size])
        place += 7 + size
        if kind in (WHOLE, LAST):
            yield b"".join(parts)
            parts = []
