"""The check of an export: what rounding may decide is not compared, all else is."""

import importlib.util

import torch

from tests.support.examples import EXAMPLES
from tests.support.forked import call


def test_what_follows_a_tie_between_experts_is_not_compared() -> None:
    assert call(compared) == [[True, True, True, True], [True, True, False, False]]


def compared() -> list[list[bool]]:
    """Return what is compared where the second of two sequences has a tie at its third token."""
    spec = importlib.util.spec_from_file_location("verify_export", EXAMPLES / "verify_export.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0]).expand(4, 2, 4).clone()
    # The worst of the two that are chosen, and the best of the others.
    logits[2, 1] = torch.tensor([2.0, 1.0, 1.0 + 1e-6, 0.0])
    # The order of the two that are chosen changes nothing.
    logits[0, 0] = torch.tensor([3.0, 3.0, 1.0, 0.0])
    return script.decided([logits], 2, torch.zeros(2, 4)).tolist()
