"""What setup.py says where it cannot build."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def ask_setup(**environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py without building anything."""
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_missing_compiler_is_said_plainly() -> None:
    finished = ask_setup(MEGALORA_CUDA="0", CXX="no-such-compiler", PATH="/nowhere")
    assert finished.returncode != 0
    assert "install g++" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_an_unknown_wish_for_cuda_is_refused() -> None:
    finished = ask_setup(MEGALORA_CUDA="yes")
    assert finished.returncode != 0
    assert "MEGALORA_CUDA is 'yes': use 0 to forbid CUDA, 1 to require it" in finished.stderr


def test_an_unknown_architecture_is_refused() -> None:
    finished = ask_setup(MEGALORA_CUDA_ARCH="91")
    assert finished.returncode != 0
    assert "MEGALORA_CUDA_ARCH is '91': use one of 80, 90a, 100a" in finished.stderr


def test_a_build_for_the_cpu_says_so() -> None:
    said = ask_setup(MEGALORA_CUDA="0").stdout
    assert "CPU ops only, because MEGALORA_CUDA=0" in said
    assert "0.1.0" in said
