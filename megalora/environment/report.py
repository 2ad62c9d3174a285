"""The report of `megalora env`: collected piece by piece, so that what is broken hides nothing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import megalora
from megalora.built import LIBRARY, read_built
from megalora.environment.machine import describe_machine, switches
from megalora.environment.packages import PACKAGES, describe
from megalora.printable import printable

type Facts = dict[str, object]

_PROBE = "megalora.environment.probe"
_STEPS = ("torch", "devices", "ops")
_WAIT_S = 180.0


def collect(library: Path = LIBRARY) -> Facts:
    """Return all facts of this machine, as `megalora env --json` prints them."""
    return {
        "megalora": {"version": megalora.__version__, "place": str(Path(megalora.__file__).parent)},
        "machine": describe_machine(),
        "packages": {package.names[0]: describe(package) for package in PACKAGES},
        "library": _library(library),
        **probe(),
        "variables": switches(),
    }


def _library(library: Path) -> Facts:
    """Return what the compiled ops were built for, which they say without being loaded."""
    found: Facts = {"place": str(library)}
    try:
        built = read_built(library)
    except OSError as error:
        return {**found, "problem": printable(error.strerror)}
    if built is None:
        return {**found, "problem": "it does not say what it was built for: build it again"}
    return found | built._asdict()


def probe(wait_s: float = _WAIT_S) -> Facts:
    """Return what torch says of itself, the devices and the ops, or why it says nothing."""
    root = str(Path(megalora.__file__).parents[1])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    try:
        finished = subprocess.run(
            [sys.executable, "-m", _PROBE],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            timeout=wait_s,
        )
        out, reason = finished.stdout, _end(finished)
    except subprocess.TimeoutExpired as late:
        out, reason = late.stdout or b"", f"no answer in {wait_s:.0f} seconds"
    found = _answers(out.decode(errors="replace"))
    # The first step without an answer is the one that ended the process.
    return {name: found.get(name, {"problem": reason}) for name in _STEPS}


def _answers(out: str) -> dict[str, Facts]:
    found: dict[str, Facts] = {}
    for line in out.splitlines():
        try:
            found |= json.loads(line)
        except (ValueError, TypeError):
            continue  # what a library prints
    return found


def _end(finished: "subprocess.CompletedProcess[bytes]") -> str:
    """Return why a process ended, in a line."""
    if finished.returncode < 0:
        return f"the process that asked was ended by {signal.Signals(-finished.returncode).name}"
    lines = finished.stderr.decode(errors="replace").strip().splitlines()
    return printable(lines[-1]) if lines else f"it ended with status {finished.returncode}"


# === As text ===


def as_text(facts: Facts) -> str:
    """Return the report for people."""
    own = cast(Facts, facts["megalora"])
    packages = cast(dict[str, Facts], facts["packages"])
    here = {name: _package(one) for name, one in packages.items() if _is_here(one)}
    missing = {name: _absent(one) for name, one in packages.items() if not _is_here(one)}
    parts = {
        f"megalora {own['version']} in {own['place']}": cast(Facts, facts["machine"]),
        "torch": facts["torch"],
        "devices": facts["devices"],
        "compiled ops, as their file says": facts["library"],
        "compiled ops, loaded": facts["ops"],
        "installed": here,
        "not installed": missing,
        "variables": facts["variables"],
    }
    return "\n\n".join(f"{title}\n{_table(cast(Facts, part))}" for title, part in parts.items())


def _is_here(package: Facts) -> bool:
    return package["version"] is not None or "problem" in package


def _package(package: Facts) -> str:
    problem = f"  <- {package['problem']}" if "problem" in package else ""
    return f"{package['version'] or 'broken'}  {package.get('place', '')}{problem}".rstrip()


def _absent(package: Facts) -> str:
    return f"{'needed for' if package['needed'] else 'would give'} {package['gives']}"


def _table(part: Mapping[str, object]) -> str:
    rows = {name: _shown(value) for name, value in part.items()}
    width = max(map(len, rows), default=0)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows.items()) or "  none"


def _shown(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(map(str, value)) or "none"
    return "none" if value is None or value == "" else str(value)
