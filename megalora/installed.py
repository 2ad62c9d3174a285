"""Whether the Megatron that is installed here is one that megalora knows."""

import importlib.util
import re
from pathlib import Path

from megalora.replace import KNOWN

_INSTALL = f"pip install 'megatron-core>={KNOWN[0]}'"


def check_megatron() -> None:
    """Raise ValueError where megatron-core is missing, or older than megalora's patches are for.

    Nothing of it is imported. A newer one is not refused here: each thing that megalora replaces
    there is looked at before it is.
    """
    directory = place_of("megatron.core")
    if directory is None or place_of("megatron.training") is None:
        part = "megatron.core" if directory is None else "megatron.training"
        raise ValueError(f"{part} is not installed for this Python: {_INSTALL}")
    version = version_in(directory)[:2]
    if version and version < tuple(map(int, KNOWN[0].split("."))):
        raise ValueError(
            f"megatron-core is {'.'.join(map(str, version))} in {directory}, which is older than "
            f"what megalora knows, {' and '.join(KNOWN)}: {_INSTALL}"
        )


def place_of(module: str) -> Path | None:
    """Return a package's directory or a module's file; None where there is none.

    Packages above it are imported, itself is not.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    if spec is None:
        return None
    return Path(next(iter(spec.submodule_search_locations or [spec.origin or "unknown"])))


def version_in(directory: Path) -> tuple[int, ...]:
    """Return major, minor and patch version that a megatron.core says, as far as it says them."""
    file = directory / "package_info.py"
    text = file.read_text(errors="replace") if file.is_file() else ""
    found = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)$", text, re.MULTILINE))
    return tuple(int(found[name]) for name in ("MAJOR", "MINOR", "PATCH") if name in found)
