"""What Megatron's writers are given of a run of adapters: the loss and the learning rate."""

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forked import Ranks
from tests.support.tiny import LORA, flags, train

# Of LevelDB's logs: the size of a block, and kinds of parts of a record.
BLOCK, WHOLE, LAST = 32768, 1, 4
RATES = [0.005, 0.01, 0.01]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranks, Path]:
    """Three steps in two stages, of which the first has nothing to train."""
    directory = tmp_path_factory.mktemp("metrics")
    writers = ["--tensorboard-dir", directory / "tensorboard", "--lr-warmup-iters", 2]
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


def test_weights_and_biases_gets_the_same_offline(run: tuple[Ranks, Path]) -> None:
    ranks, directory = run
    (file,) = (directory / "wandb").glob("**/*.wandb")
    rows: dict[int, dict[str, float]] = {}
    for step, name, value in history(file):
        rows.setdefault(step, {})[name] = value
    losses = {step: row["lm loss"] for step, row in rows.items() if step != 2}
    assert losses == pytest.approx(printed(ranks), rel=1e-5)
    assert [row["learning-rate"] for row in rows.values()] == pytest.approx(RATES)


def history(file: Path) -> Iterator[tuple[int, str, float]]:
    """Yield step, name and value of what was logged offline."""
    from wandb.proto.wandb_internal_pb2 import Record

    for data in blocks(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        for item in record.history.item:
            name = item.key or item.nested_key[0]
            if name in ("lm loss", "learning-rate"):
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
