"""Real runs that are killed, stopped, run out of disk, or are given the wrong thing."""

import random
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalora.__main__ import main
from tests.support.forked import Ranks, call
from tests.support.tiny import ASYNC, LORA, MODEL, back_to, flags, same_tensors, train

NUM_KILLS = 10
LAYOUT = flags("do")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of iterations 3 and 6 of one rank."""
    directory = tmp_path_factory.mktemp("adapter") / "run"
    train(1, directory, *LORA, "--pretrained-checkpoint", base).succeed()
    return directory


def start_killed(base: Path, directory: Path, iterations: int) -> Ranks:
    more = [*LORA, *LAYOUT, "--pretrained-checkpoint", base, "--save-interval", 1]
    return train(2, directory, *more, iters=iterations)


def wait_for_losses(run: Ranks, number: int) -> None:
    run.wait_until(lambda: len(run.losses()) >= number)


@pytest.mark.parametrize(
    ("kills", "iterations"),
    [(3, 12), pytest.param(10, 20, marks=pytest.mark.full)],
    ids=["three", "ten"],
)
def test_kills_at_any_moment_change_no_bit(
    base: Path, tmp_path: Path, kills: int, iterations: int
) -> None:
    whole = start_killed(base, tmp_path / "whole", iterations)
    wait_for_losses(whole, 1)
    first = time.monotonic()
    whole.succeed()
    pace = (time.monotonic() - first) / iterations
    # Of the first three the middle one has saved before it is killed, and either rank is.
    moments = random.Random(1)
    for _ in range(kills):
        run = start_killed(base, tmp_path / "killed", iterations)
        # After a logged iteration it saves most of the time; the second tells that one is saved.
        wait_for_losses(run, moments.randint(1, 2))
        time.sleep(moments.uniform(0.0, pace))
        assert run.is_alive(), run.text()
        run.kill(moments.randrange(2))
        assert any(run.wait())
    assert min(run.losses()) > 1, "no restart resumed: the comparison is vacuous"
    start_killed(base, tmp_path / "killed", iterations).succeed()
    assert call(same_tensors, tmp_path / "whole", tmp_path / "killed", iterations)


def flip_a_bit(data: bytearray) -> None:
    data[len(data) // 2] ^= 1


def tear(data: bytearray) -> None:
    del data[:-10]


# What --use-checkpoint-args reads is at the end of the file.
@pytest.mark.parametrize(
    ("damage", "more"), [(flip_a_bit, []), (tear, ["--use-checkpoint-args"])], ids=["bit", "args"]
)
def test_a_damaged_real_checkpoint_is_survived(
    base: Path,
    adapter: Path,
    tmp_path: Path,
    damage: Callable[[bytearray], None],
    more: list[str],
) -> None:
    directory = back_to(adapter, tmp_path / "run", 3)
    back_to(adapter, tmp_path / "newest", 6)
    (tmp_path / "newest" / "iter_0000006").rename(directory / "iter_0000006")
    (directory / "latest_checkpointed_iteration.txt").write_text("6")
    file = directory / "iter_0000006" / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    damage(data)
    file.write_bytes(data)
    given = [*LORA, "--pretrained-checkpoint", base, *more]
    if more:
        stopped = train(1, directory, *given, "--lora-on-corrupt", "stop").fail()
        assert "Iteration 3 is intact" in stopped
    run = train(1, directory, *given).succeed()
    assert run.text().count("__0_0.distcp does not match its checksum") == 1
    assert sorted(run.losses()) == [4, 5, 6]
    assert call(same_tensors, adapter, directory, 6)


@pytest.mark.bad_input("a write that fails")
def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    directory = back_to(adapter, tmp_path / "run", 3)
    # Logs stay below 100 KB, the tensors of a checkpoint do not.
    run = train(1, directory, *LORA, "--pretrained-checkpoint", base, env={"FILE_LIMIT": "200000"})
    text = run.fail()
    assert "error: checkpoint of iteration 6 was not saved" in text
    assert "File too large" in text
    assert "What is left there is iteration 3, intact" in text
    train(1, directory, *LORA, "--pretrained-checkpoint", base).succeed()
    assert call(same_tensors, adapter, directory, 6)


@pytest.mark.parametrize("mode", [[], ASYNC], ids=["synchronous", "asynchronous"])
def test_a_request_to_stop_saves_first(base: Path, tmp_path: Path, mode: list[str]) -> None:
    directory = tmp_path / "run"
    more = [*LORA, *mode, "--pretrained-checkpoint", base, "--exit-signal-handler"]
    more += ["--export-hf", tmp_path / "adapter"]
    # Once before the signal: what the first save starts, as it does on GPUs, has to survive it.
    run = train(2, directory, *more, "--save-interval", 5, iters=1000, env={"SPAWN": "1"})
    run.wait_until(lambda: max(run.losses(), default=0) >= 6)
    run.terminate()
    run.succeed()
    iteration = int((directory / "latest_checkpointed_iteration.txt").read_text())
    assert 5 < iteration < 1000
    assert call(same_tensors, directory, directory, iteration)
    # There may be no time for more, so the last line says how to get the rest.
    assert not (tmp_path / "adapter").exists()
    command = run.text().rpartition("> LoRA: or: megalora ")[2].splitlines()[0]
    assert call(main, shlex.split(command)) == 0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_finished_run_that_starts_again_writes_its_exports(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    directory = back_to(adapter, tmp_path / "run", 6)
    more = [*LORA, "--pretrained-checkpoint", base, "--save-merged", tmp_path / "merged"]
    run = train(1, directory, *more).succeed()
    assert "iteration 6 was the last" in run.text()
    assert run.losses() == {}
    assert (tmp_path / "merged" / "latest_checkpointed_iteration.txt").read_text() == "release"


REFUSED = {
    "no base": ([], "were trained on"),
    "other rank": (["--lora-rank", "4"], "lora_rank is 4 but the checkpoint has 8"),
    "other targets": (["--lora-targets", "attn"], "lora_targets is ['attn'] but the checkpoint"),
    "other alpha": (["--lora-alpha", "16"], "lora_alpha is 16.0 but the checkpoint has 32.0"),
    "finetune": (["--finetune"], "--lora-load"),
    "other optimizer": (["--use-distributed-optimizer"], "leave out --use-distributed-optimizer"),
    "other schedule": (["--lr-decay-style", "cosine"], "set --override-opt-param-scheduler"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_resume_that_contradicts_its_checkpoint_is_refused(
    base: Path, adapter: Path, tmp_path: Path, case: str
) -> None:
    more, message = REFUSED[case]
    directory = back_to(adapter, tmp_path / "run", 3)
    if case != "no base":
        more = [*more, "--pretrained-checkpoint", str(base)]
    assert message in train(1, directory, *LORA, *more).fail()


def test_another_base_is_named_and_can_be_allowed(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    train(1, other, "--no-save-optim", "--seed", 5, iters=1).succeed()
    directory = back_to(adapter, tmp_path / "run", 3)
    more = [*LORA, "--pretrained-checkpoint", other]
    text = train(1, directory, *more).fail()
    assert str(other) in text
    assert str(base) in text
    assert "weight has norm" in text
    run = train(1, directory, *more, "--lora-allow-other-base").succeed()
    assert "WARNING: base is" in run.text()


def test_a_base_of_another_shape_is_refused(base: Path, tmp_path: Path) -> None:
    wide = ["--ffn-hidden-size" if flag == "--ffn-hidden-size" else flag for flag in MODEL]
    wide[wide.index("--ffn-hidden-size") + 1] = "128"
    more = [*LORA, "--pretrained-checkpoint", base]
    text = train(1, tmp_path / "run", *more, model=wide).fail()
    assert "does not fit the model" in text
    assert "linear_fc" in text


def test_adapters_without_lora_rank_say_what_to_do(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    directory = back_to(adapter, tmp_path / "run", 3)
    assert "set --lora-rank 8" in train(1, directory).fail()


def test_flags_left_out_come_from_the_checkpoint(base: Path, tmp_path: Path) -> None:
    given = [*LORA, "--pretrained-checkpoint", base]
    some = ["--lora-alpha", 16, "--lora-targets", "attn", "--lora-lr-ratio", 4]
    train(1, tmp_path / "whole", *given, *some).succeed()
    back_to(tmp_path / "whole", tmp_path / "run", 3)
    train(1, tmp_path / "run", *given).succeed()
    assert call(same_tensors, tmp_path / "whole", tmp_path / "run", 6)
