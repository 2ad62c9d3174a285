"""What setup.py says where it cannot build."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megalora
from megalora.built import LIBRARY

ROOT = Path(__file__).parents[1]


def ask_setup(tmp_path: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py without building anything.

    tmp_path: for a torch that is nothing but its version, which is imported in no time.
    """
    if tmp_path is not None:
        (tmp_path / "torch.py").write_text('__version__ = "2.13.0"')
        environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_missing_compiler_is_said_plainly(tmp_path: Path) -> None:
    finished = ask_setup(tmp_path, MEGALORA_CUDA="0", CXX="no-such-compiler", PATH="/nowhere")
    assert finished.returncode != 0
    assert "install g++" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_an_unknown_wish_for_cuda_is_refused(tmp_path: Path) -> None:
    finished = ask_setup(tmp_path, MEGALORA_CUDA="yes")
    assert finished.returncode != 0
    assert "MEGALORA_CUDA is 'yes': use 0 to forbid CUDA, 1 to require it" in finished.stderr


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    finished = ask_setup(tmp_path, MEGALORA_CUDA_ARCH="91")
    assert finished.returncode != 0
    assert "MEGALORA_CUDA_ARCH is '91': use one of 80, 90a, 100a" in finished.stderr


def test_a_build_for_the_cpu_says_so() -> None:
    said = ask_setup(MEGALORA_CUDA="0", MEGALORA_LABEL="1").stdout
    assert "CPU ops only, because MEGALORA_CUDA=0" in said
    assert said.splitlines()[-1] == f"{megalora.__version__}+cpu"


@pytest.mark.parametrize(
    ("torch", "message"),
    [
        (
            None,
            "beside a torch, and none is here: `pip install torch setuptools wheel ninja` first",
        ),
        ('__version__ = "2.9.1+cu128"', "needs torch 2.11 or newer, and 2.9.1+cu128 is installed"),
    ],
)
def test_a_torch_that_does_not_do_is_said_plainly(
    tmp_path: Path, torch: str | None, message: str
) -> None:
    module = "sitecustomize" if torch is None else "torch"
    (tmp_path / f"{module}.py").write_text(torch or 'import sys; sys.modules["torch"] = None')
    finished = ask_setup(PYTHONPATH=str(tmp_path))
    assert finished.returncode != 0
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


def test_the_library_asks_torch_for_its_stable_abi_alone() -> None:
    """What C++ has of torch changes with its versions: a symbol of it would end every other one."""
    listed = subprocess.run(["nm", "-D", "-u", LIBRARY], capture_output=True, text=True, check=True)
    needed = re.findall(r"^\s+([Uw]) ([^\s@]+)", listed.stdout, re.MULTILINE)
    of_torch = {name for _, name in needed if re.search("c10|torch|[^s]at::|_ZN?K?2at", name)}
    assert {name for name in of_torch if not re.match(r"(aoti_)?torch_", name)} == set()
    assert len(of_torch) > 20
    # Which brings the part for CUDA, where there is one.
    about = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True)
    assert "[libtorch.so]" in about.stdout
    # What a torch without CUDA, or one before 2.13, has not.
    optional = {name for kind, name in needed if kind == "w"} & of_torch
    assert {name for name in of_torch if "cuda" in name and "device_type" not in name} <= optional
    assert "torch_exception_get_what_without_backtrace" in optional


MAKEFILE = ROOT / "Makefile"
PYTHONS = {
    # What it is asked is its version, or to make a virtual environment.
    "exit 1": r"megalora needs Python 3.12, ./python is .*: make PYTHON=python3.12",
    'case "$*" in *venv*) mkdir -p .venv/bin; touch .venv/bin/python; exit 1;; esac': "./python "
    r"cannot make a virtual environment: install its venv \(apt-get install python3.12-venv\)",
}


@pytest.mark.parametrize("does", PYTHONS, ids=["another", "without venv"])
def test_a_python_that_does_not_do_is_named_with_what_to_do(does: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    said = make_venv(tmp_path, "./python")
    assert re.search(PYTHONS[does], said)
    assert not (tmp_path / ".venv").exists()


def test_a_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "there is no python9: make PYTHON=/path/to/python3.12" in make_venv(tmp_path, "python9")


def make_venv(directory: Path, python: str) -> str:
    """Return what `make` says of a virtual environment that it cannot make."""
    command = ["make", "-f", str(MAKEFILE), f"PYTHON={python}", ".venv/bin/python"]
    finished = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert finished.returncode
    return finished.stdout


def test_the_changelog_and_the_citation_are_of_this_version() -> None:
    newest = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = dict(re.findall(r"^(\S+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert newest is not None
    assert newest.groups() == (cited["version"], cited["date-released"])
    assert cited["version"] == megalora.__version__
