"""What runs on a lent GPU once: rehearsed here, so that nothing is left to be found there."""

import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.support.forked import ROOT
from tests.support.waiting import wait_until
from tests.support.watchdog import run_watched

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check
import gpu_kit
import gpu_report

NEEDS_GPU = {"kernels"}
# Other stages run the same programs with the same flags.
REPEATED = {
    *("memcheck", "racecheck", "training", "ranks", "grid"),
    *("model-dense", "model-qwen3-4", "model-qwen3-8", "model-qwen3-48"),
}
REHEARSED = [stage.name for stage in gpu_check.STAGES if stage.name not in REPEATED]


def rows_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rehearse every kind of stage on the CPU; return the directory of results."""
    logs = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--budget", "86400"]
    finished = run_watched(
        [
            *(*command, "--output", str(logs / "results"), "--kit", str(logs / "none")),
            *("--only", *REHEARSED),
        ],
        logs,
        cwd=ROOT,
        # Three kernels of torch.compile on the CPU take less without than their headers' compiling.
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        },
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    return logs / "results"


def program(stage: gpu_check.Stage) -> tuple[str, set[str]]:
    """Return what a stage starts, without the files that it gives pytest, and its flags."""
    name = " ".join(stage.words[:2]) if stage.words[0] == "-m" else stage.words[0]
    return name, {word for word in stage.words if word.startswith("-")}


def test_what_is_not_rehearsed_has_the_program_and_the_flags_of_what_is() -> None:
    rehearsed = [program(stage) for stage in gpu_check.STAGES if stage.name in REHEARSED]
    for stage in gpu_check.STAGES:
        name, flags = program(stage)
        assert any(name == other and flags <= others for other, others in rehearsed), stage.name
        assert all((ROOT / word).is_file() for word in stage.words if word.endswith(".py"))


def test_a_rehearsal_passes_every_stage(rehearsal: Path) -> None:
    outcomes = {row["stage"]: row["outcome"] for row in rows_of(rehearsal) if "stage" in row}
    assert list(outcomes) == REHEARSED
    assert {name for name, outcome in outcomes.items() if outcome != "passed"} == NEEDS_GPU
    assert all(outcomes[name] == "skipped" for name in NEEDS_GPU), "skipped is not passed"


def test_a_rehearsal_leaves_a_line_for_every_variant_and_a_table(rehearsal: Path) -> None:
    found = {(row["bench"], row.get("variant")) for row in rows_of(rehearsal) if "bench" in row}
    for bench in ("linear goal", "linear forms", "experts"):
        for variant in ("frozen", "eager", "megalora", "floor"):
            assert (bench, variant) in found
    assert ("host", "megalora") in found
    assert ("linear goal", "torch.compile") in found
    report = (rehearsal / "report.md").read_text()
    for heading in (
        "## Stages",
        "## linear goal",
        "## experts",
        "## host",
        "## model",
        "## device",
    ):
        assert heading in report


def test_the_report_extrapolates_two_depths_of_qwen3_to_all_its_layers(tmp_path: Path) -> None:
    row = {"bench": "model", "kind": "qwen3-30b-a3b", "name": "LoRA", "tokens": 4096}
    rows = [{**row, "layers": layers, "step_ms": 20.0 + 5 * layers} for layers in (4, 8)]
    other = {**row, "layers": 4, "tokens": 8192, "step_ms": 70.0}
    text = "\n".join(json.dumps(one) for one in [{"setting": {}}, *rows, other])
    (tmp_path / "results.jsonl").write_text(text)
    gpu_report.write_report(tmp_path)
    said = [
        line for line in (tmp_path / "report.md").read_text().splitlines() if "layer, so" in line
    ]
    assert len(said) == 1
    assert said[0].startswith("Qwen3-30B-A3B, LoRA: 5.00 ms a layer, so 260 ms for 48, ")


def test_old_results_are_never_mixed_with_new_ones(rehearsal: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_check.py", "--rehearse", "--output", str(rehearsal)]
    before = (rehearsal / "results.jsonl").read_text()
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "has results already" in finished.stderr
    assert (rehearsal / "results.jsonl").read_text() == before


def check(directory: Path, seconds: float) -> gpu_check.Check:
    """Return a run with some seconds left, whose stages may be any commands."""
    (directory / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(directory / "temporary")}
    return gpu_check.Check(
        directory, directory, environment, time.monotonic() + seconds, 1, rehearsing=False
    )


def stage(name: str, code: str, limit_s: int = 60) -> gpu_check.Stage:
    return gpu_check.Stage(name, ("-c", code), limit_s, group="together")


def test_a_stage_that_hangs_or_fails_ends_no_other(tmp_path: Path) -> None:
    hanging = "import subprocess, time; subprocess.Popen(['sleep', '98765']); time.sleep(98765)"
    check(tmp_path, 3600).run(
        [
            stage("hangs", hanging, limit_s=2),
            stage("fails", "raise SystemExit(3)"),
            stage("passes", "print('well')"),
        ]
    )
    outcomes = {row["stage"]: row["outcome"] for row in rows_of(tmp_path)}
    assert outcomes["hangs"].startswith("failed: no end after")
    assert outcomes["fails"] == "failed: exit status 3"
    assert outcomes["passes"] == "passed"
    # A killed one is gone a moment later.
    wait_until(
        lambda: subprocess.run(["pgrep", "-f", "sleep 98765"], capture_output=True).returncode == 1
    )
    log = (tmp_path / "log.txt").read_text()
    assert "well" in log
    assert 'File "<string>", line 1 in <module>' in log, "where it hung"


def test_a_command_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    one = gpu_check.Stage("checked", ("-c", "pass"), 60, sanitizer="memcheck")
    run = check(tmp_path, 3600)
    run.environment["PATH"] = ""
    os_path = os.environ["PATH"]
    try:
        os.environ["PATH"] = ""
        run.run([one])
    finally:
        os.environ["PATH"] = os_path
    assert rows_of(tmp_path)[0]["outcome"] == "failed"


def test_what_no_time_is_left_for_is_skipped_and_said_to_be(tmp_path: Path) -> None:
    check(tmp_path, -1).run([stage("late", "pass")])
    assert rows_of(tmp_path)[0]["outcome"] == "skipped: no time was left"
    assert "| late | skipped: no time was left |" in (tmp_path / "report.md").read_text()


def test_half_a_line_of_results_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text(
        '{"stage": "one", "outcome": "passed", "seconds": 1}\n{"st'
    )
    gpu_report.write_report(tmp_path)
    assert "| one | passed | 1 |" in (tmp_path / "report.md").read_text()


# === The kit ===


def fat_binary(*architectures: int) -> bytes:
    """Return a fat binary with eight bytes of code for each architecture."""
    entries = b"".join(
        struct.pack("<HHIQ", 2, 257, 64, 8).ljust(28, b"\0").ljust(28, b"\0")
        + struct.pack("<I", arch).ljust(36, b"\0")
        + bytes([arch]) * 8
        for arch in architectures
    )
    return struct.pack("<IHHQ", gpu_kit.FATBIN_MAGIC, 1, 16, len(entries)) + entries


def test_code_for_other_architectures_becomes_zeros() -> None:
    library = b"before" + fat_binary(80, 90, 100) + b"between" + fat_binary(90, 75) + b"after"
    slim = gpu_kit.keep_architecture(library, 90)
    assert len(slim) == len(library)
    for arch, count in ((90, 2), (80, 0), (100, 0), (75, 0)):
        assert slim.count(bytes([arch]) * 8) == count, arch
    assert slim.replace(b"\0", b"").count(b"between") == 1
    assert gpu_kit.keep_architecture(slim, 90) == slim


def kit_in(folder: Path) -> Path:
    folder.mkdir()
    (folder / "_C.so").write_bytes(b"library")
    for name in ("datasets-1.0-py3-none-any.whl", "transformer_engine-2.0-py3-none-any.whl"):
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    gpu_kit.describe(folder, "90a")
    return folder


def test_a_kit_unpacks_transformer_engine_into_a_folder_of_its_own(tmp_path: Path) -> None:
    site, te = gpu_kit.open_kit(kit_in(tmp_path / "kit")).unpack(tmp_path)
    assert (site / "datasets/__init__.py").exists()
    assert not (site / "transformer_engine").exists()
    assert (te / "transformer_engine/__init__.py").exists()


def test_a_changed_kit_is_refused(tmp_path: Path) -> None:
    folder = kit_in(tmp_path / "kit")
    (folder / "_C.so").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"_C\.so is missing or changed"):
        gpu_kit.open_kit(folder)


def test_a_kit_of_another_csrc_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = kit_in(tmp_path / "kit")
    monkeypatch.setattr(gpu_kit, "checksum_of_sources", lambda: "another")
    with pytest.raises(ValueError, match="has the library of another csrc"):
        gpu_kit.open_kit(folder)


def test_a_folder_that_is_no_kit_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    command = [sys.executable, "benchmarks/gpu_kit.py", "--output", str(tmp_path)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 2
    assert "is not a kit" in finished.stderr
    assert (tmp_path / "mine").read_text() == "kept"
