"""What ends a script before it trains, in one sentence."""

import traceback
from pathlib import PurePath

from megalora.training.needed import place_in_megatron, said_by_megatron


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
        if isinstance(error, AssertionError | ValueError):
            return said_by_megatron(error), True
        return f"{type(error).__name__} in {place_in_megatron(last)}: {said}", False
    if isinstance(error, ValueError):
        return said, True
    where = f" ({PurePath(last.filename).name}:{last.lineno})" if last else ""
    return f"{type(error).__name__}: {said}{where}", False
