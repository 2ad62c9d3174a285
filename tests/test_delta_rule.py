"""The gated delta rule in torch is the recurrence, of every packed sequence by itself."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, normalize, silu

from megalora.mends.delta_rule import causal_convolution, gated_delta_rule, unit_length

HEADS, D_K, D_V = 3, 8, 6
LENGTH = 150
# Lengths 1, 64, 1, 64 and 20: below, at and above those of a chunk.
BOUNDS = (0, 1, 65, 66, 130, LENGTH)
Inputs = list[Tensor]


def drawn(batch: int, dtype: torch.dtype = torch.float64, length: int = LENGTH) -> Inputs:
    """Return queries, keys, values, decays and betas as a layer has them."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(batch, length, HEADS, *shape, generator=generator, dtype=torch.float64)

    query, key = (normalize(draw(D_K), dim=-1) for _ in range(2))
    values = [query, key, draw(D_V), -draw().exp(), draw().sigmoid()]
    return [value.to(dtype).requires_grad_() for value in values]


def step_by_step(inputs: Inputs, starts: Sequence[int]) -> Tensor:
    """Follow the state of every head from token to token; it is 0 at each start."""
    query, key, value, decay, beta = inputs
    state, out = value.new_zeros(()), []
    for t in range(query.shape[1]):
        if t in starts:
            state = value.new_zeros(query.shape[0], HEADS, D_K, D_V)
        state = state * decay[:, t].exp()[..., None, None]
        known = (state * key[:, t, ..., None]).sum(-2)
        correction = beta[:, t, :, None] * (value[:, t] - known)
        state = state + key[:, t, ..., None] * correction[..., None, :]
        out.append((state * query[:, t, ..., None]).sum(-2) / D_K**0.5)
    return torch.stack(out, 1)


def gradients(out: Tensor, inputs: Inputs) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_chunks_are_the_recurrence_with_every_gradient(bounds: tuple[int, ...] | None) -> None:
    inputs = drawn(1 if bounds else 2)
    out = gated_delta_rule(*inputs, None if bounds is None else torch.tensor(bounds))
    expected = step_by_step(inputs, bounds or (0,))
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    pairs = zip(gradients(out, inputs), gradients(expected, inputs), strict=True)
    for found, right in pairs:
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


def test_a_sequence_takes_nothing_from_the_one_before_it() -> None:
    inputs = drawn(1)
    packed = gated_delta_rule(*inputs, torch.tensor(BOUNDS))
    for start, end in itertools.pairwise(BOUNDS):
        alone = gated_delta_rule(*(x[:, start:end] for x in inputs))
        torch.testing.assert_close(packed[:, start:end], alone, rtol=0, atol=1e-12)
    assert (packed - gated_delta_rule(*inputs))[:, 66:].abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_qwen3_nexts_in_transformers(name: str, dtype: torch.dtype) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next

    query, key, value, decay, beta = drawn(2, dtype)
    rule = getattr(modeling_qwen3_next, name)
    expected, _ = rule(query, key, value, g=decay, beta=beta)
    found = gated_delta_rule(query, key, value, decay, beta)
    assert found.dtype == expected.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("width", [1, 4])
def test_a_convolution_sees_the_last_tokens_of_its_own_sequence(width: int) -> None:
    x = torch.randn(1, LENGTH, 5, dtype=torch.float64)
    weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((5, width), (5,)))

    def plain(part: Tensor) -> Tensor:
        rows = conv1d(part.mT, weight[:, None], bias, padding=width - 1, groups=5)
        return silu(rows[..., : part.shape[1]]).mT

    torch.testing.assert_close(causal_convolution(x, weight, bias), plain(x))
    packed = causal_convolution(x, weight, bias, torch.tensor(BOUNDS))
    sizes = torch.tensor(BOUNDS).diff().tolist()
    expected = torch.cat([plain(part) for part in x.split(sizes, 1)], 1)
    torch.testing.assert_close(packed, expected)
    assert width == 1 or not torch.allclose(packed, plain(x))


def test_vectors_get_the_length_one() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert unit_length(x).tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert unit_length(x.bfloat16()).dtype == torch.bfloat16
