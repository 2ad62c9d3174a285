"""What ends a script before it trains, in one sentence."""

import linecache
import traceback
from pathlib import PurePath


def refusal(error: BaseException) -> tuple[str, bool]:
    """Return why a rank's script ended, and whether that is a sentence about its input.

    Megatron's own checks are said to be its own, with their place; a bare assertion by its text.
    """
    if isinstance(error, SystemExit):
        return str(error.code).removeprefix("error: "), isinstance(error.code, str)
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    said = str(error).strip()
    if last is not None and "megatron" in PurePath(last.filename).parts:
        place = _place(last)
        if isinstance(error, AssertionError | ValueError):
            return f"{said or _source(last)} (Megatron's own check, {place})", True
        return f"{type(error).__name__} in {place}: {said}", False
    if isinstance(error, ValueError):
        return said, True
    where = f" ({PurePath(last.filename).name}:{last.lineno})" if last else ""
    return f"{type(error).__name__}: {said}{where}", False


def _place(frame: traceback.FrameSummary) -> str:
    parts = PurePath(frame.filename).parts
    inside = parts[len(parts) - 1 - parts[::-1].index("megatron") :]
    return f"{'/'.join(inside)}:{frame.lineno}"


def _source(frame: traceback.FrameSummary) -> str:
    """Return the statement that a frame stands in, in one line."""
    first = frame.lineno or 0
    lines = range(first, (frame.end_lineno or first) + 1)
    text = " ".join(linecache.getline(frame.filename, line).strip() for line in lines)
    return f"it asks for `{text.removeprefix('assert ')}`"
