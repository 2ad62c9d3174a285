"""A rank that was meant for a GPU and has none ends the run; elsewhere the CPU runs it."""

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megalora import cpu
from megalora.cpu import signs
from tests.support.forked import ROOT, with_root
from tests.support.watchdog import run_watched


@pytest.mark.parametrize("file", ["proc/driver/nvidia/version", "dev/nvidia0", "dev/nvidiactl"])
def test_files_of_the_driver_are_a_sign(file: str, tmp_path: Path) -> None:
    assert signs.gpu_signs({}, tmp_path) == []
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert signs.gpu_signs({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []
    (sign,) = signs.gpu_signs({}, tmp_path)
    assert sign == f"/{file.removesuffix('/version')} exists"


@pytest.mark.parametrize(
    "environ",
    [
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"GROUP_WORLD_SIZE": "2"},
        {"SLURM_NNODES": "2"},
        {"SLURM_JOB_NUM_NODES": "16"},
        {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
    ],
    ids=lambda environ: " ".join(f"{name}={value}" for name, value in environ.items()),
)
def test_the_environment_of_a_gpu_or_of_several_nodes_is_a_sign(
    environ: dict[str, str], tmp_path: Path
) -> None:
    (sign,) = signs.gpu_signs(environ, tmp_path)
    for name, value in environ.items():
        assert name in sign
        assert value in sign


@pytest.mark.parametrize(
    "environ",
    [
        {"CUDA_VISIBLE_DEVICES": "", "SLURM_NNODES": "2"},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"},
        # Slurm's and others' forms of numbers are not always numbers.
        {"WORLD_SIZE": "4", "SLURM_NNODES": "1", "SLURM_JOB_NUM_NODES": ""},
    ],
)
def test_one_node_without_a_driver_is_no_sign(environ: dict[str, str], tmp_path: Path) -> None:
    assert signs.gpu_signs(environ, tmp_path) == []


class Torchrun:
    """The store that torchrun's agent serves, and the environments of its ranks."""

    def __init__(self, world_size: int) -> None:
        self.store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self.ranks = [
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(self.store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            for rank in range(world_size)
        ]


def test_a_sibling_with_a_gpu_is_a_sign() -> None:
    torchrun = Torchrun(3)
    ranks = torchrun.ranks
    with ThreadPoolExecutor(2) as pool:
        on_cpu = [pool.submit(signs.sibling_signs, rank) for rank in ranks[::2]]
        assert signs.tell_siblings("cuda", ranks[1]) is not None
        found = [future.result() for future in on_cpu]
    assert found == [["rank 1 of this run has a CUDA device"]] * 2


def test_siblings_on_the_cpu_are_no_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun, silent = Torchrun(2), Torchrun(2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(signs.sibling_signs, torchrun.ranks)) == [[], []]
    # One that never tells: another program.
    monkeypatch.setattr(signs, "_WAIT", timedelta(seconds=1))
    assert signs.sibling_signs(silent.ranks[0]) == []
    assert signs.sibling_signs({"WORLD_SIZE": "2", "RANK": "0"}) == []


def test_a_sign_ends_the_run_unless_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = []
    monkeypatch.setattr(cpu, "install", lambda: installed.append(True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is '3'"):
        cpu.install_if_wanted(["--lora-rank", "8"])
    assert not installed
    assert cpu.install_if_wanted(["--cpu"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cpu.install_if_wanted(["--lora-rank", "8"])
    assert len(installed) == 2


@pytest.mark.parametrize(
    "program", [["examples/pretrain_lora.py"], ["-m", "megalora", "run", "examples/demo.py"]]
)
def test_the_message_names_node_rank_cause_and_what_to_do(
    program: list[str], tmp_path: Path
) -> None:
    # As on one node of two whose driver is broken; not the first rank there.
    node = {"RANK": "11", "LOCAL_RANK": "3", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
    finished = run_watched(
        # A GPU that does not exist, also on machines that have some.
        [sys.executable, *program, "--lora-rank", "8"],
        tmp_path,
        cwd=ROOT,
        env={**os.environ, **node, "CUDA_VISIBLE_DEVICES": "99", "PYTHONPATH": with_root()},
    )
    assert finished.returncode == 1
    (line,) = [line for line in finished.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith(f"error: rank 11 on node {socket.gethostname()} has no CUDA device (")
    assert "CUDA_VISIBLE_DEVICES is '99'" in line
    assert "WORLD_SIZE is 16 and LOCAL_WORLD_SIZE 8" in line
    assert line.endswith("for a run on the CPU give --cpu")
    assert "Traceback" not in finished.stderr
