"""What a bare GPU machine lacks, in one folder: for machines without a package index.

python benchmarks/gpu_kit.py [--output .gpu-kit] [--arch 90a] [--te DIR] [--extra PACKAGE ...]

The folder gets megalora's library for one architecture, the wheels of what the image lacks, and
kit.json, which says what they are. `--te` adds TransformerEngine: its library has
code for nine architectures, 276 MB; only that of one is kept, 25 MB. DIR holds the wheel of
transformer_engine_torch for that torch, which exists as source only.
"""

import argparse
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WHEELS = ("megatron-core", "datasets", "dill", "multiprocess", "google-re2")
TE_WHEELS = ("transformer-engine", "transformer-engine-cu13")
# What TransformerEngine imports and an image for torch need not have.
TE_NEEDS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")
TE_NEEDS += ("importlib-metadata", "nvdlfw-inspect")
LARGEST = 24 * 2**20
DESCRIPTION = "kit.json"
FATBIN_MAGIC = 0xBA55ED50


@dataclass(frozen=True)
class Kit:
    """A folder that `make gpu-kit` has filled."""

    folder: Path
    facts: dict[str, Any]

    @property
    def library(self) -> Path:
        """The compiled ops."""
        return self.folder / "_C.so"

    @property
    def wheels(self) -> list[Path]:
        """The packages."""
        return sorted(self.folder.glob("*.whl"))

    def fits(self) -> bool:
        """Say whether the library is one for the torch that runs."""
        import torch

        sys.path.insert(0, str(ROOT))  # megalora is not installed on a bare machine
        from megalora.built import misfit

        return misfit(self.library, torch.__version__, torch.version.cuda) is None

    def unpack(self, target: Path) -> list[Path]:
        """Unpack the wheels, as pip would without checking what they need; return the folders.

        TransformerEngine has one of its own, so that a run can be without it.
        """
        folders = [target / "site", target / "te"]
        for wheel in self.wheels:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folders[wheel.name.startswith("transformer_engine")])
        for folder in folders:
            # By a process of its own: workers of this one would need its script, which may be none.
            subprocess.run([sys.executable, "-m", "compileall", "-qq", "-j", "0", folder])
        return folders


def open_kit(folder: Path) -> Kit:
    """Return the kit in a folder; ValueError where a file or csrc is not what it was made of."""
    description = folder / DESCRIPTION
    if not description.exists():
        raise ValueError(f"kit {folder} has no kit.json: make it by `make gpu-kit`")
    facts = json.loads(description.read_text())
    for name, digest in facts["files"].items():
        path = folder / name
        if not path.exists() or sha256(path) != digest:
            raise ValueError(f"kit {folder}: {name} is missing or changed: `make gpu-kit` again")
    if facts.get("sources") != checksum_of_sources():
        raise ValueError(f"kit {folder} has the library of another csrc: `make gpu-kit` again")
    return Kit(folder, facts)


def checksum_of_sources() -> str:
    """Return one checksum of all that the library is built from."""
    sources = [ROOT / "setup.py", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    return hashlib.sha256("".join(map(sha256, sorted(sources))).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    """Collect everything beside the folder, then put it in place of the one before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / ".gpu-kit")
    parser.add_argument(
        "--arch", default="90a", help="compute capability of the GPU: 80, 90a, 100a"
    )
    parser.add_argument("--te", type=Path, help="folder with transformer_engine_torch's wheel")
    parser.add_argument("--extra", nargs="*", default=[], help="more packages, such as a peer's")
    options = parser.parse_args()
    if options.output.exists() and not (options.output / DESCRIPTION).exists():
        parser.error(f"--output {options.output} is not a kit: give a new folder")
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".gpu-kit-") as temporary:
        folder = Path(temporary) / "kit"
        folder.mkdir()
        build_library(folder, options.arch)
        download(folder, [*pinned(WHEELS), *options.extra])
        if options.te:
            add_transformer_engine(folder, options.te, options.arch)
        describe(folder, options.arch)
        shutil.rmtree(options.output, ignore_errors=True)
        folder.rename(options.output)
    size = sum(path.stat().st_size for path in options.output.iterdir())
    print(f"{options.output}: {size / 2**20:.1f} MiB")
    if size > LARGEST and not options.te:
        raise SystemExit(f"the kit has more than {LARGEST / 2**20:.0f} MiB")


def build_library(folder: Path, arch: str) -> None:
    """Build csrc for one architecture."""
    with tempfile.TemporaryDirectory() as built:
        run(
            *(sys.executable, "setup.py", "build_ext"),
            *("--build-lib", built, "--build-temp", built),
            MEGALORA_CUDA="1",
            MEGALORA_CUDA_ARCH=arch,
        )
        shutil.copy(Path(built) / "megalora/_C.so", folder / "_C.so")


def pinned(packages: tuple[str, ...]) -> list[str]:
    """Return the packages in the versions that are installed here, which the tests are run with."""
    from importlib.metadata import version

    return [f"{package}=={version(package)}" for package in packages]


def download(folder: Path, packages: list[str]) -> None:
    """Download wheels for the GPU machine, without what they need."""
    run(
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--progress-bar", "off"),
        *("--only-binary", ":all:", "-d", folder, *packages),
    )


def add_transformer_engine(folder: Path, built: Path, arch: str) -> None:
    """Add TransformerEngine with the code of one architecture."""
    [binding] = sorted(built.glob("transformer_engine_torch-*.whl"))
    version = binding.name.split("-")[1]
    shutil.copyfile(binding, folder / binding.name)
    download(folder, [*(f"{name}=={version}" for name in TE_WHEELS), *TE_NEEDS])
    [whole] = folder.glob("transformer_engine_cu13-*.whl")
    slim(whole, int("".join(filter(str.isdigit, arch))))


def slim(wheel: Path, arch: int) -> None:
    """Pack a wheel again: its CUDA code for other architectures as zeros, strongly compressed."""
    slimmed = wheel.with_suffix(".tmp")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(slimmed, "w", zipfile.ZIP_LZMA) as target,
    ):
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(".so"):
                content = keep_architecture(content, arch)
            target.writestr(name, content)
    slimmed.replace(wheel)


def keep_architecture(library: bytes, arch: int) -> bytes:
    """Return a library whose device code for all but one architecture is zeros.

    A fat binary is a header (magic u32, version u16, header size u16, payload size u64) and one
    entry for each architecture: kind u16, version u16, header size u32, payload size u64, then at
    byte 28 its architecture u32. Headers stay: the driver skips entries that are not its own.
    """
    content = bytearray(library)
    magic = struct.pack("<I", FATBIN_MAGIC)
    position = content.find(magic)
    while position >= 0:
        header, size = struct.unpack_from("<HQ", content, position + 6)
        entry, end = position + header, position + header + size
        if size == 0 or end > len(content):
            position = content.find(magic, position + 4)
            continue
        while entry < end:
            entry_header, payload = struct.unpack_from("<IQ", content, entry + 4)
            (own,) = struct.unpack_from("<I", content, entry + 28)
            start = entry + entry_header
            if own != arch:
                content[start : start + payload] = bytes(payload)
            entry = start + payload
        position = content.find(magic, end)
    return bytes(content)


def describe(folder: Path, arch: str) -> None:
    """Write kit.json."""
    commit = run("git", "describe", "--always", "--dirty", capture=True).strip()
    files = {
        path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != DESCRIPTION
    }
    facts = {
        "arch": arch,
        "commit": commit,
        "sources": checksum_of_sources(),
        "files": files,
    }
    (folder / DESCRIPTION).write_text(json.dumps(facts, indent=1) + "\n")


def run(*command: object, capture: bool = False, **environment: str) -> str:
    """Run a command in the checkout; stop with its output where it fails."""
    finished = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if finished.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{finished.stdout}{finished.stderr}")
    return finished.stdout if capture else ""


if __name__ == "__main__":
    main()
