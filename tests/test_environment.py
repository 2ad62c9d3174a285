"""`megalora env` says what is here, and says it also where something is broken."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import megalora
from megalora.__main__ import main, make_parser
from megalora.environment import machine, probe, report
from megalora.environment.packages import PACKAGES, Package, describe
from tests.support.forked import with_root

NAMES = [package.names[0] for package in PACKAGES]


def probed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what the process that asks torch prints, by its step."""
    probe.main()
    lines = capsys.readouterr().out.splitlines()
    return {name: found for line in lines for name, found in json.loads(line).items()}


def instead_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Give the process that asks another torch."""
    (tmp_path / "torch.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), with_root()]))


# === What torch says ===


def test_torch_the_devices_and_the_ops_are_asked(capsys: pytest.CaptureFixture[str]) -> None:
    found = probed(capsys)
    assert list(found) == list(report._STEPS)
    assert found["torch"]["version"] == torch.__version__
    assert "CPU" in found["ops"]["tried on"]
    devices = found["devices"]
    assert devices["CUDA devices"] or devices["why none"]


def test_a_device_is_named_with_its_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, total_memory=139 * 2**30)
    for name, answer in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: one)
    found = probe._devices()
    assert found == {"CUDA devices": ["NVIDIA H200, sm_90, 139 GiB"] * 2}


@pytest.mark.parametrize(
    ("where", "name", "step"),
    [
        (torch.cuda, "is_available", "devices"),
        (probe, "load", "ops"),
        (probe, "nccl", "torch"),
    ],
)
def test_a_step_that_fails_says_so_and_the_others_stand(
    where: Any, name: str, step: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("driver shut down")

    broken.version = broken  # type: ignore[attr-defined]
    monkeypatch.setattr(where, name, broken)
    found = probed(capsys)
    assert found[step] == {"problem": "RuntimeError: driver shut down"}
    others = [one for one in report._STEPS if one != step and (step, one) != ("devices", "ops")]
    assert all("problem" not in found[one] for one in others)


def test_an_op_that_gives_something_else_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = SimpleNamespace(shrink=lambda x, lora_A: x @ lora_A.T + 1)
    monkeypatch.setattr(probe, "load", lambda: wrong)
    with pytest.raises(ValueError, match="shrink on CPU gives"):
        probe._ops()


# === Where it does not answer ===

ENDS = {
    'raise ImportError("libcudart.so.13: not there")': "ImportError: libcudart.so.13: not there",
    "import os; os.kill(os.getpid(), 11)": f"was ended by {signal.SIGSEGV.name}",
    "import os; os._exit(3)": "it ended with status 3",
    "import time; time.sleep(600)": "no answer in 1 seconds",
}


@pytest.mark.parametrize("text", ENDS)
def test_a_process_that_ends_or_hangs_is_told_of(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instead_of_torch(tmp_path, monkeypatch, text)
    found = report.probe(wait_s=1.0 if "sleep" in text else 60.0)
    assert set(found) == set(report._STEPS)
    for step in found.values():
        assert ENDS[text] in step["problem"]  # type: ignore[index]


def test_what_a_process_said_before_it_ended_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 'import os\nprint(\'noise\\n{"torch": {"version": "2.13.0"}}\', flush=True)\nos.abort()'
    (tmp_path / "dies.py").write_text(lines)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(report, "_PROBE", "dies")
    found = report.probe()
    assert found["torch"] == {"version": "2.13.0"}
    assert found["devices"] == found["ops"]
    assert "SIGABRT" in str(found["ops"])


@pytest.mark.parametrize("text", [None, b"", b"\x7fELF and nothing else"])
def test_a_broken_library_is_told_of(text: bytes | None, tmp_path: Path) -> None:
    library = tmp_path / "_C.so"
    if text is not None:
        library.write_bytes(text)
    expected = "No such file" if text is None else "does not say what it was built for"
    assert expected in str(report._library(library)["problem"])


# === Packages ===


def test_a_package_has_its_version_and_its_place() -> None:
    found = describe(Package(("torch",), "torch", "all tensors"))
    assert found["version"] == torch.__version__.split("+")[0]
    assert Path(str(found["place"])) == Path(torch.__file__).parent


def test_a_package_within_another_has_its_version_alone() -> None:
    assert describe(Package(("torch",), "", ""))["version"] == torch.__version__.split("+")[0]
    assert describe(Package(("no-such-package",), "", ""))["version"] is None


def test_a_missing_package_says_what_it_would_give() -> None:
    found = describe(Package(("no-such-package",), "no_such.package", "nothing"))
    assert found["version"] is None
    assert report._absent(found) == "would give nothing"


def test_a_checkout_of_megatron_says_its_own_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = tmp_path / "megatron_of_a_checkout"
    core.mkdir()
    (core / "__init__.py").write_text("raise RuntimeError('imported')")
    (core / "package_info.py").write_text("MAJOR = 0\nMINOR = 19\nPATCH = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert describe(Package(("no-such",), core.name, ""))["version"] == "0.19.2"


def test_another_package_called_apex_is_told_from_nvidias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    apex = next(package for package in PACKAGES if package.module == "apex")
    assert "another project" in str(describe(apex)["problem"])
    (tmp_path / "apex/multi_tensor_apply").mkdir()
    assert "problem" not in describe(apex)


def test_a_package_that_fails_where_it_is_looked_for_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_parent.py").write_text("raise OSError('disk')")
    monkeypatch.syspath_prepend(tmp_path)
    assert describe(Package(("x",), "broken_parent.child", ""))["problem"] == "disk"


# === The machine ===


def test_only_variables_that_are_no_secrets_are_shown() -> None:
    given = {
        "MEGALORA_OPS": "reference",
        "NCCL_DEBUG": "INFO\x1b[2J",
        "CUDA_VISIBLE_DEVICES": "0",
        "NVTE_FLASH_ATTN": "0",
        "HF_TOKEN": "secret",
        "WANDB_API_KEY": "secret",
    }
    shown = machine.switches(given)
    assert sorted(shown) == sorted(name for name in given if given[name] != "secret")
    assert shown["NCCL_DEBUG"] == r"INFO\x1b[2J"


def test_a_compiler_that_is_not_there_is_none() -> None:
    found = machine.describe_machine({"CXX": "/no/such/compiler", "CUDA_HOME": "/no/such"})
    assert found["compiler"] is found["nvcc"] is None
    assert str(found["python"]).startswith("3.")


# === The command ===


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Return a function that runs the command where torch cannot be imported."""
    instead_of_torch(tmp_path, monkeypatch, 'raise ImportError("no libtorch")')

    def run(*words: str) -> str:
        assert main(["env", *words]) == 0
        return capsys.readouterr().out

    return run


def test_the_command_reports_where_torch_cannot_be_imported(printed: Any) -> None:
    text = printed()
    assert text.startswith(f"megalora {megalora.__version__} in ")
    assert text.count("problem  ImportError: no libtorch") == 3
    assert all(name in text for name in NAMES)


def test_the_command_prints_json(printed: Any) -> None:
    facts = json.loads(printed("--json"))
    assert list(facts["packages"]) == NAMES
    assert facts["megalora"]["version"] == megalora.__version__
    assert facts["torch"] == {"problem": "ImportError: no libtorch"}
    assert facts["library"]["oldest_torch"] == "2.11"


def test_the_command_does_not_wait_for_the_parsers_of_others() -> None:
    assert re.findall(r"^ {4}(\S+)", make_parser("env").format_help(), re.M) == ["run", "env"]
