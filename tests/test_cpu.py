"""What can be said of megalora.cpu without other processes."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import megalora
from megalora import cpu
from tests.support.forked import call

RUN = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, which nothing has patched."""
    return subprocess.run([sys.executable, "-c", code], env=RUN, capture_output=True, text=True)


def test_importing_megalora_installs_nothing() -> None:
    code = """
import torch
before = torch.cuda.current_device, torch.empty, torch.Tensor.to, torch.distributed.isend
import megalora, megalora.cpu
assert not megalora.cpu.installed()
assert before == (
    torch.cuda.current_device, torch.empty, torch.Tensor.to, torch.distributed.isend
)
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr


def test_install_patches_once_and_leaves_torch_compile_to_users() -> None:
    code = """
import torch
compile_ = torch.compile
import megalora.cpu
megalora.cpu.install()
empty = torch.empty
megalora.cpu.install()
assert torch.empty is empty
assert torch.compile is compile_
assert torch.empty(2, device="cuda").device.type == "cpu"
assert torch.ones(2).to("cuda:0").cuda().device.type == "cpu"
with torch.device("meta"):
    assert torch.arange(2).device.type == "meta"

@torch.compile(backend="aot_eager", fullgraph=True)
def double(x):
    return x.to("cuda") * 2 + torch.zeros(2, device="cuda")

x = torch.ones(2, requires_grad=True)
double(x).sum().backward()
assert x.grad.tolist() == [2.0, 2.0]
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr


def test_install_after_megatron_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", types.ModuleType("megatron.core"))
    with pytest.raises(
        RuntimeError, match=r"call megalora\.cpu\.install\(\) before the first import"
    ):
        cpu.install()
    assert not cpu.installed()


def test_cpu_is_wanted_where_asked_for_or_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert cpu.wanted(["--cpu"])
    assert not cpu.wanted(["--lora-rank", "8"])
    assert not cpu.install_if_wanted(["--lora-rank", "8"])
    assert not cpu.installed()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cpu.wanted([])


def test_public_names_stay_functions_once_their_modules_are_loaded() -> None:
    assert call(_not_functions) == []


def _not_functions() -> list[str]:
    # Twice: the first use of a name imports its module.
    names = [*megalora.__all__, *megalora.__all__]
    return [name for name in names if not callable(getattr(megalora, name))]


def test_a_run_on_the_cpu_is_as_without_transformer_engine(tmp_path: Path) -> None:
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('its kernels need a GPU')")
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
import megalora.cpu
megalora.cpu.install_if_wanted(["--cpu"])
from megatron.core.extensions.transformer_engine import HAVE_TE
assert not HAVE_TE
"""
    finished = run_python(code)
    assert finished.returncode == 0, finished.stderr
