"""A rank that fails alone says why, once, and all others end with it within seconds."""

import datetime
import json
from pathlib import Path

import pytest
import torch.distributed as dist

from megalora.training import alarm
from tests.support.forked import SCRIPT, Ranks, free_port
from tests.support.tiny import LORA, MODEL, TRAIN, flags
from tests.test_example import EXAMPLE

# The message alone, as users see it.
PLAIN = {"MEGALORA_TRACEBACK": ""}
GIVEN = [*MODEL, *TRAIN, *LORA, "--train-iters", 3]

alone = pytest.mark.bad_input("a rank that fails alone")


def all_end(run: Ranks, said: str) -> str:
    """Return what all ranks wrote; each has ended by itself, and one of them has said why."""
    codes = run.end()
    text = run.text()
    assert all(codes), f"{codes}\n{text}"
    assert text.count(said) == 1, text
    return text


def script_with(tmp_path: Path, step: str) -> Path:
    """Write a launch script whose ranks do something at the start of their steps."""
    text = SCRIPT.read_text()
    start = "def forward_step(data_iterator, model, return_schedule_plan=False):\n"
    assert start in text
    path = tmp_path / "script.py"
    more = "    rank, iteration = torch.distributed.get_rank(), get_args().curr_iteration\n"
    path.write_text(f"import os, time\n{text.replace(start, f'{start}{more}    {step}\n')}")
    return path


@alone
@pytest.mark.parametrize(
    ("own", "said"),
    [
        # Of argparse, of Megatron and of megalora.
        ("--lora-rank some", "error: argument --lora-rank: invalid int value: 'some'"),
        ("--train-samples 8", "(Megatron's own check, "),
        ("--export-hf /proc", "error: export_hf '/proc' is a mount point"),
    ],
)
def test_a_bad_flag_before_ranks_have_met(own: str, said: str, tmp_path: Path) -> None:
    given = [word for word in GIVEN if word not in ("--vocab-size", "255")]
    run = Ranks(
        2,
        [*given, "--byte-tokenizer", "--dataset", "stdlib-docstrings"],
        tmp_path,
        script=EXAMPLE,
        by_megalora=False,
        env=PLAIN,
        own_flags={1: own.split()},
    )
    all_end(run, said)


@alone
def test_a_data_file_that_one_rank_does_not_have(tmp_path: Path) -> None:
    there = tmp_path / "rows.jsonl"
    there.write_text("\n".join(json.dumps({"text": "some words"}) for _ in range(9)))
    given = [word for word in GIVEN if word not in ("--vocab-size", "255")]
    own = {0: ["--dataset", there], 1: ["--dataset", tmp_path / "gone.jsonl"]}
    run = Ranks(
        2,
        [*given, "--byte-tokenizer"],
        tmp_path / "logs",
        script=EXAMPLE,
        by_megalora=False,
        env=PLAIN,
        own_flags=own,
    )
    text = all_end(run, "gone.jsonl is not there: check the path")
    assert "Traceback" not in text


@alone
@pytest.mark.parametrize(("ranks", "failing"), [(2, 0), (2, 1), (4, 0), (4, 3)])
def test_an_error_in_the_middle_of_training(ranks: int, failing: int, tmp_path: Path) -> None:
    script = script_with(tmp_path, f"if rank == {failing} and iteration: raise OSError('lost')")
    layout = flags("tp2 sp") if ranks == 4 else []
    run = Ranks(ranks, [*GIVEN, *layout], tmp_path / "logs", script=script, env=PLAIN)
    all_end(run, "OSError: lost")


@alone
@pytest.mark.parametrize("failing", [0, 1])
def test_ranks_that_would_wait_for_ever(failing: int, tmp_path: Path) -> None:
    # As in a collective of NCCL, which no peer's end interrupts.
    step = f"if rank == {failing}: raise RuntimeError('boom')\n    while True: time.sleep(1)"
    run = Ranks(2, GIVEN, tmp_path / "logs", script=script_with(tmp_path, step), env=PLAIN)
    text = all_end(run, "RuntimeError: boom")
    assert text.count("Traceback (most recent call last)") == 1
    waiting = 1 - failing
    assert f"megalora: rank {waiting} on " in text
    assert f" ends, because rank {failing} on " in text


@alone
def test_rank_0_that_is_killed(tmp_path: Path) -> None:
    step = "if rank == 0: os.kill(os.getpid(), 9)\n    while True: time.sleep(1)"
    run = Ranks(2, GIVEN, tmp_path / "logs", script=script_with(tmp_path, step), env=PLAIN)
    all_end(run, "ends, because rank 0 has gone")


@alone
@pytest.mark.parametrize("flag", ["--lora-targets linear_nothing", "--lora-nothing 3"])
def test_what_all_ranks_find_wrong_is_said_once(flag: str, tmp_path: Path) -> None:
    text = all_end(Ranks(4, [*GIVEN, *flag.split()], tmp_path, env=PLAIN), "error: ")
    assert "nothing" in text
    assert "usage:" not in text
    assert "megalora: rank" not in text


def test_all_speak_where_tracebacks_are_asked_for(tmp_path: Path) -> None:
    run = Ranks(2, [*GIVEN, "--lora-targets", "linear_nothing"], tmp_path)
    run.end()
    assert all("error: " in log.read_text() for log in run.logs)


@alone
def test_an_attempt_of_torchrun_ends_where_a_rank_fails_and_the_next_one_does_not(
    tmp_path: Path,
) -> None:
    wait = datetime.timedelta(seconds=60)
    agent = dist.TCPStore("localhost", 0, is_master=True, timeout=wait, wait_for_workers=False)
    script = script_with(tmp_path, "if rank == 1: raise OSError('lost')")
    # Longer than a rank has that was told.
    lives = "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '1': time.sleep(3), sys.exit(0)\n"
    script.write_text(f"import os, sys, time\n{lives}{script.read_text()}")
    env = {**PLAIN, "MASTER_PORT": str(agent.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for attempt, fails in enumerate([True, False]):
        more = {**env, "TORCHELASTIC_RESTART_COUNT": str(attempt)}
        run = Ranks(2, GIVEN, tmp_path / str(attempt), script=script, env=more)
        assert [code != 0 for code in run.end()] == [fails, fails], run.text()


def met(agent: dist.TCPStore, rank: int) -> alarm.Alarm:
    """Start one rank's alarm in this process."""
    names = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": agent.port}
    environ = {name: str(value) for name, value in names.items()}
    return alarm.Alarm({**environ, "TORCHELASTIC_USE_AGENT_STORE": "True"})


@pytest.mark.bad_input("a rank that disagrees")
def test_a_rank_on_another_device_is_found_before_ranks_meet() -> None:
    agent = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    first, second = met(agent, 0), met(agent, 1)
    try:
        first.compare("device", "cuda")
        second.compare("order", "same")
        with pytest.raises(ValueError, match=r"device is cpu on rank 1 .*, but cuda on rank 0 "):
            second.compare("device", "cpu")
    finally:
        second.close()
        first.close()


@alone
def test_a_rank_that_cannot_reach_rank_0_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm, "_START", datetime.timedelta(seconds=1))
    environ = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}
    with pytest.raises(ValueError, match=r"rank 3 on .* cannot reach rank 0 at localhost:"):
        alarm.Alarm({**environ, "MASTER_PORT": str(free_port())})
