"""What the ops and the choice of their implementation say where they are given something wrong."""

import json
from pathlib import Path

import pytest
import torch

from megalora.built import LIBRARY, read_built
from megalora.ops import backend, reference
from megalora.ops.fused import _load_library, load

SEED = torch.tensor([11])
fused = load()
X, A, B = torch.zeros(4, 6), torch.zeros(2, 6), torch.zeros(8, 2)
W = torch.zeros(8, 6)
AA, BB, S8 = torch.stack([A, A]), torch.stack([B, B]), torch.zeros(4, 8)
Y, S, ENDS = torch.zeros(4, 8), torch.zeros(4, 2), torch.tensor([1, 4])
MISUSES = {
    "dtype": (
        lambda: fused.expand_(Y.double(), S, B, 1.0),
        "lora_B has dtype Float, expected that of y, Double",
    ),
    "width": (lambda: fused.shrink(X, A[:, :5]), "lora_A's last size is 5, expected 6"),
    "rank": (
        lambda: fused.expand_(Y, S, B, 1.0, None, [4, 4]),
        "last size of s or ds is 2, expected 4",
    ),
    "period": (
        lambda: fused.expand_dgrad(Y, B, 1.0, None, [3, 2]),
        "period 5, expected a divisor of the output features, 8",
    ),
    "segment": (
        lambda: fused.expand_dgrad(Y, B, 1.0, None, [9, -1]),
        "expected sizes of at least 0",
    ),
    "rows": (
        lambda: fused.expand_(Y, S[:3], B, 1.0),
        r"s has shape \[3, 2\], expected the leading sizes of y",
    ),
    "probability": (
        lambda: fused.shrink(X, A, p=1.0, seed=SEED),
        r"p is 1, expected a dropout probability in \[0, 1\)",
    ),
    "seed": (lambda: fused.shrink(X, A, p=0.1), "seed is missing, expected an int64 tensor"),
    "seed dtype": (lambda: fused.shrink(X, A, p=0.1, seed=SEED.int()), "seed is Int of shape"),
    "experts": (lambda: fused.shrink(X, A, ENDS), "lora_A has 2 dimensions, expected 3"),
    "number of experts": (
        lambda: fused.shrink(X, A[None], ENDS),
        "number of experts|is 1, expected 2",
    ),
    "decreasing": (
        lambda: fused.shrink(X, torch.zeros(2, 2, 6), ENDS.flip(0)),
        r"offsets\[1\] is 1, expected 4 to 4",
    ),
    "beyond": (
        lambda: fused.shrink(X, torch.zeros(2, 2, 6), ENDS + 1),
        r"offsets\[1\] is 5, expected 2 to 4",
    ),
    "offsets dtype": (
        lambda: fused.shrink(X, A, ENDS.float()),
        "offsets has dtype Float, expected int32 or int64",
    ),
    "gradient dtype": (
        lambda: fused.expand_wgrad_(B.double(), Y, S, 1.0),
        "d_b has dtype Double, expected that of dy, Float",
    ),
    "narrower gradient": (
        lambda: fused.shrink_wgrad_(A, S.double(), X.double()),
        "d_a has dtype Float, expected that of x, Double",
    ),
    "gradient shape": (
        lambda: fused.expand_backward_(B[:7], Y, S, B, 1.0),
        r"d_b has shape \[7, 2\], expected that of lora_B, \[8, 2\]",
    ),
    "weight dtype": (
        lambda: fused.linear(X, W.double(), A, B, 1.0),
        "weight has dtype Double, expected that of x, Float",
    ),
    "weight width": (
        lambda: fused.linear(X, W[:, :5], A, B, 1.0),
        "weight's last size is 5, expected 6, the last size of x",
    ),
    "weight height": (
        lambda: fused.linear_backward(Y, X, S, W[:7], A, B, 1.0),
        "weight's first size is 7, expected 8, the last size of dy",
    ),
    "rows of A": (
        lambda: fused.linear(X, W, A, B, 1.0, [4, 4]),
        "lora_A's number of rows is 2, expected 4, one rank block for each segment",
    ),
    "width of A": (
        lambda: fused.linear_backward(Y, X, S, W, A[:, :5], B, 1.0),
        "lora_A's last size is 5, expected 6, the input features",
    ),
    "rows of s": (
        lambda: fused.linear_backward(Y, X, S[:3], W, A, B, 1.0),
        r"s has shape \[3, 2\], expected the leading sizes of dy",
    ),
    "rows of B": (
        lambda: fused.linear(X, W, A, B[:7], 1.0),
        "lora_B's number of rows is 7, expected 8, the output features",
    ),
    "rows of x": (
        lambda: fused.linear_backward(Y, X[:3], S, W, A, B, 1.0),
        r"x has shape \[3, 6\], expected the leading sizes of dy",
    ),
    "width of x": (
        lambda: fused.linear_backward(Y, X[:, :5], S, W, A, B, 1.0),
        "the last size of x is 5, expected 6, weight's last size",
    ),
    "width of s": (
        lambda: fused.linear_backward(Y, X, X, W, A, B, 1.0),
        "last size of s or ds is 6, expected 2, one rank block for each segment",
    ),
    "shape of dA": (
        lambda: fused.linear_backward_(B, B, Y, X, S, W, A, B, 1.0),
        r"d_a has shape \[8, 2\], expected that of lora_A, \[2, 6\]",
    ),
    "dtype of dB": (
        lambda: fused.linear_backward_(A, B.half(), Y, X, S, W, A, B, 1.0),
        "d_b has dtype Half, expected that of dy, Float",
    ),
    "number of weights": (
        lambda: fused.experts_linear(X, [W], A[None], B[None], 1.0, ENDS),
        "the number of weights is 1, expected 2, one for each of the offsets",
    ),
    "weights of two shapes": (
        lambda: fused.experts_linear(X, [W, W[:7]], AA, BB, 1.0, ENDS),
        "weight's first size is 7, expected 8, that of the first",
    ),
    "width of experts' s": (
        lambda: fused.experts_linear_backward(Y, X, S, [W, W], AA, BB, 1.0, ENDS),
        "the last size of s is 2, expected 8, the ranks up to a multiple of 8",
    ),
    "shape of experts' sum": (
        lambda: fused.experts_linear_backward_(A, BB, Y, X, S8, [W, W], AA, BB, 1.0, ENDS),
        r"d_a has shape \[2, 6\], expected that of lora_A, \[2, 2, 6\]",
    ),
    "one dimension": (lambda: fused.shrink(X[0], A), "x has 1 dimensions, expected 2 to 4"),
    "integers": (lambda: fused.shrink(X.int(), A.int()), "dtype Int is not supported on cpu"),
}


@pytest.mark.parametrize("misuse", MISUSES)
def test_errors_name_the_argument_and_what_was_expected(misuse: str) -> None:
    call, message = MISUSES[misuse]
    with pytest.raises(ValueError, match=message):
        call()


def marked(oldest_torch: str = "2.11", cuda: int = 0) -> bytes:
    """Return what csrc/built.cpp leaves in a library."""
    facts = {"oldest_torch": oldest_torch, "compiler": "12.2.0", "cuda": cuda, "architectures": ""}
    return b"\x7fnot ELF\0megalora is built " + json.dumps(facts).encode() + b"\0"


def test_a_missing_library_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"it is not built.*--no-build-isolation.*in a checkout"):
        _load_library(tmp_path / "_C.so")


def test_memory_that_is_not_there_is_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    """Torch's own words come with it, in the error or before torch 2.13 on stderr."""
    with pytest.raises(RuntimeError, match=r"no memory for \[\d+, 2\] of Float on cpu") as raised:
        fused.shrink(X[:1].expand(2**48, 6), A)
    assert "allocate" in str(raised.value) + capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "file too short"),
        (b"megalora is built {", "file too short|invalid ELF header"),
        (marked("9.13"), r"it needs torch 9\.13 or newer, and this is torch \d"),
        (marked(cuda=99010), r"its CUDA ops are for CUDA 99, and this torch (has CUDA|is built w)"),
        (marked(), "invalid ELF header"),
    ],
)
def test_a_library_that_does_not_load_says_why_and_what_to_do(
    tmp_path: Path, text: bytes, reason: str
) -> None:
    library = tmp_path / "_C.so"
    library.write_bytes(text)
    with pytest.raises(
        ImportError, match=rf"_C\.so cannot be loaded: .*({reason}).*: install a wh"
    ):
        _load_library(library)


def test_the_library_says_what_it_is_built_for() -> None:
    built = read_built(LIBRARY)
    assert built is not None
    text = (Path(__file__).parents[1] / "setup.py").read_text()
    assert f"OLDEST_TORCH = ({built.oldest_torch.replace('.', ', ')})" in text
    has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key("megalora::shrink", "CUDA")
    assert bool(built.cuda) == bool(built.architectures) == has_cuda


def test_the_environment_overrides_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend("fused") is fused
    monkeypatch.setenv("MEGALORA_OPS", "reference")
    assert backend("fused") is reference
    monkeypatch.setenv("MEGALORA_OPS", "fastest")
    with pytest.raises(ValueError, match="'fastest' is unknown"):
        backend("fused")
