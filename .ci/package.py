"""Build sdist and wheel into dist/, install each into a fresh environment, and use it there.

python .ci/package.py [--keep DIRECTORY]

The wheel is built from the sdist, and is installed where no compiler is. The environment gets what
the wheel asks for and nothing else, in the versions of constraints.txt; at the end the wheel is put
beside the oldest torch that it takes.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.metadata import Metadata
from packaging.utils import parse_sdist_filename, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
SDIST = "build_meta.build_sdist('dist')"
TRY = ROOT / ".ci" / "try_installed.py"
OLDEST_TORCH = "2.11"
START = time.monotonic()
# What an isolated build, one without torch, and one without a compiler have to say.
ISOLATED = "give pip --no-build-isolation"
NO_COMPILER = "needs a C++20 compiler and found none"


def main() -> None:
    """Build, install, use; raise where anything is not as it has to be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, help="work in this directory and leave it there")
    options = parser.parse_args()
    os.chdir(ROOT)
    shutil.rmtree(DIST, ignore_errors=True)
    sdist, wheel = build()
    check_contents(sdist, wheel)
    # Torch is some GB, for which /tmp may have no room.
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as temporary:
        install_and_use(options.keep or Path(temporary), sdist, wheel)
    for path in (sdist, wheel):
        print(
            f"{path.relative_to(ROOT)}: {path.stat().st_size / 2**20:.1f} MiB, installs and works"
        )


def build() -> tuple[Path, Path]:
    """Return the sdist of the checkout and the wheel of the sdist."""
    say("the sdist")
    run([sys.executable, "-c", f"from setuptools import build_meta; {SDIST}"])
    [sdist] = DIST.glob("*.tar.gz")
    say("the wheel, from the sdist")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    run([*pip, "--wheel-dir", DIST, sdist], MEGALORA_LABEL="1")
    [wheel] = DIST.glob("*.whl")
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """Fail where a file is missing or too many, or the metadata is incomplete."""
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tracked = run(["git", "ls-files", "csrc", "megalora", "examples"]).split()
    wanted = {*tracked, "setup.py", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert wanted <= inside, f"not in {sdist.name}: {sorted(wanted - inside)}"
    assert not any(name.endswith(".so") for name in inside), f"{sdist.name} has a built library"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [file] = (name for name in names if name.endswith(".dist-info/METADATA"))
        # Strict: an unknown field, a wrong specifier or an unknown licence raises.
        metadata = Metadata.from_email(archive.read(file), validate=True)
    package = {name for name in tracked if name.startswith("megalora/")} | {"megalora/_C.so"}
    others = {name for name in names - package if ".dist-info/" not in name}
    assert package <= names, f"not in {wheel.name}: {sorted(package - names)}"
    assert not others, f"too much in {wheel.name}: {sorted(others)}"
    [torch] = (one for one in metadata.requires_dist or () if one.name == "torch")
    assert str(torch.specifier) == f">={OLDEST_TORCH}", torch
    for field in ("summary", "description", "requires_python", "classifiers", "requires_dist"):
        assert getattr(metadata, field), f"{wheel.name} says no {field}"
    assert metadata.description_content_type == "text/markdown"
    _, version, _, [tag] = parse_wheel_filename(wheel.name)
    assert (tag.interpreter, tag.abi) == ("cp312", "abi3"), tag
    assert re.fullmatch(r"cpu|cuda\d+", version.local or ""), version
    assert version.public == str(parse_sdist_filename(sdist.name)[1]) == metadata.version.public


def install_and_use(work: Path, sdist: Path, wheel: Path) -> None:
    """Install the wheel, then the sdist in its place, into an environment that has nothing else."""
    work.mkdir(parents=True, exist_ok=True)
    run([sys.executable, "-m", "venv", "--clear", work / "venv"])
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    source = work / sdist.name.removesuffix(".tar.gz")
    bin_ = work / "venv" / "bin"
    pip = [bin_ / "python", "-m", "pip", "--disable-pip-version-check"]
    install = [*pip, "install", "--progress-bar", "off", "--constraint", ROOT / "constraints.txt"]

    say("pip install of the sdist, without torch")
    assert ISOLATED in fails([*install, sdist])
    say("pip install of the wheel, without a compiler")
    run([*install, wheel], PATH=str(bin_))
    use(bin_, source)

    say("pip install of the sdist beside torch, isolated and without a compiler")
    run([*pip, "uninstall", "--yes", "megalora"])
    assert ISOLATED in fails([*install, sdist])
    run([*install, "setuptools", "wheel", "ninja"])
    beside = [*install, "--no-build-isolation", sdist]
    assert NO_COMPILER in fails(beside, PATH=str(bin_), MEGALORA_CUDA="0")
    say("pip install of the sdist beside torch")
    run(beside)
    use(bin_, source)
    use_beside_oldest_torch(pip, bin_, source, wheel)


def use_beside_oldest_torch(pip: Sequence[object], bin_: Path, source: Path, wheel: Path) -> None:
    """Put the same wheel beside the oldest torch that it takes; use it there."""
    say(f"pip install of the wheel beside torch {OLDEST_TORCH}, without a compiler")
    run([*pip, "uninstall", "--yes", "megalora"])
    oldest = [*pip, "install", "--progress-bar", "off", wheel, f"torch=={OLDEST_TORCH}.*"]
    run(oldest, PATH=str(bin_))
    version = run([bin_ / "python", "-c", "import torch; print(torch.__version__)"])
    assert version.startswith(f"{OLDEST_TORCH}."), version
    use(bin_, source)


def use(bin_: Path, source: Path) -> None:
    """Use the package that is installed, from a directory that has none of it."""
    work = bin_.parents[1]
    version = run([bin_ / "megalora", "--version"], cwd=work).strip()
    assert version == run([sys.executable, "setup.py", "--version"], cwd=source).split()[-1], (
        version
    )
    facts = json.loads(run([bin_ / "megalora", "env", "--json"], cwd=work))
    problems = {name: part for name, part in facts.items() if "problem" in part}
    assert not problems, problems
    assert Path(facts["megalora"]["place"]).is_relative_to(bin_.parent), facts["megalora"]
    missing = [
        name for name, one in facts["packages"].items() if one["needed"] and not one["version"]
    ]
    assert not missing, f"the package does not ask for {missing}"
    print(run([bin_ / "python", "-I", TRY, source / "examples"], cwd=work))


def say(what: str) -> None:
    """Announce a step, with the seconds since the start."""
    print(f"[{time.monotonic() - START:.0f} s] {what}", flush=True)


def run(command: Sequence[object], cwd: Path = ROOT, **variables: str) -> str:
    """Return what a command prints; raise with all of it where it fails."""
    finished = _finished(command, cwd, variables)
    if finished.returncode:
        raise SystemExit(f"{finished.stdout}\nerror: {' '.join(map(str, command))} failed")
    return finished.stdout


def fails(command: Sequence[object], cwd: Path = ROOT, **variables: str) -> str:
    """Return what a command prints that has to fail, in one line."""
    finished = _finished(command, cwd, variables)
    assert finished.returncode, f"{command} did not fail:\n{finished.stdout}"
    return " ".join(finished.stdout.split())


def _finished(
    command: Sequence[object], cwd: Path, variables: dict[str, str]
) -> "subprocess.CompletedProcess[str]":
    # Nothing of this checkout may stand in for what is installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**env, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if "--json" not in command else None,
        text=True,
    )


if __name__ == "__main__":
    main()
