"""The compiled ops on CPU against the reference, which is checked against known answers itself."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalora.ops import reference
from megalora.ops.fused import load
from megalora.ops.philox import dropout_mask, philox
from tests.support.op_cases import (
    CASES,
    TOLERANCE,
    Case,
    assert_matches_reference,
    draw,
    relative_error,
)

SEED = torch.tensor([11])
DTYPES = list(TOLERANCE)
fused = load()


# === The reference ===


def test_philox_gives_the_published_answer() -> None:
    """Source: philox4x32 7 of Random123's kat_vectors, counter and key zero."""
    words = philox(torch.tensor([0]), torch.tensor([0]))
    assert words.tolist() == [[0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]]


def test_dropout_keeps_the_asked_share() -> None:
    mask = dropout_mask((400, 500), 0.3, SEED)
    sigma = (0.3 * 0.7 / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - 0.7) < 4 * sigma
    assert not torch.equal(mask, dropout_mask((400, 500), 0.3, SEED + 1))


def test_the_reference_reads_one_rank_block_for_each_projection() -> None:
    """Against three separate linears, with q, k and v interleaved by query group."""
    size, rank = {"q": 4, "k": 2, "v": 2}, 3
    s, y = torch.randn(5, 9), torch.zeros(5, 16)
    lora_B = {name: torch.randn(2, width, rank) for name, width in size.items()}
    stacked = torch.cat(list(lora_B.values()), dim=1).flatten(0, 1)
    reference.expand_(y, s, stacked, 0.5, segments=list(size.values()))
    blocks = [
        0.5 * s[:, p * rank : (p + 1) * rank] @ lora_B[name][group].T
        for group, (p, name) in itertools.product(range(2), enumerate(size))
    ]
    torch.testing.assert_close(y, torch.cat(blocks, dim=1))


# === The compiled ops ===


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_op_matches_the_reference(case: Case, dtype: torch.dtype, p: float) -> None:
    assert_matches_reference(fused, case, dtype, p)


@settings(max_examples=25, deadline=None)
@given(
    st.builds(
        Case,
        tokens=st.integers(0, 70),
        in_features=st.integers(1, 40),
        segments=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
        periods=st.integers(1, 3),
        rank=st.integers(1, 18),
        experts=st.sampled_from([0, 2, 3, 7]),
    )
)
@example(Case(1, 1, (1,), 1, rank=1))  # shrink_dgrad_ leaves little of its one sum
def test_every_op_matches_the_reference_at_any_size(case: Case) -> None:
    assert_matches_reference(fused, case, torch.float32, 0.2)


def test_a_projection_that_reads_another_rank_block_is_noticed() -> None:
    """Control: the comparison must fail where q, k and v are mixed up."""
    problem = draw(CASES[1], torch.float32)
    right, wrong = problem.y.clone(), problem.y.clone()
    reference.expand_(right, problem.s, problem.lora_B, 0.7, segments=[5, 2, 2])
    fused.expand_(wrong, problem.s, problem.lora_B, 0.7, segments=[2, 5, 2])
    assert relative_error(wrong, right) > 0.1


@pytest.mark.parametrize("shape", [(6, 10), (3, 2, 10), (1, 2, 3, 10)])
def test_tokens_may_have_two_to_four_dimensions(shape: tuple[int, ...]) -> None:
    x, lora_A, lora_B = torch.randn(shape), torch.randn(4, 10), torch.randn(7, 4)
    y = torch.zeros(*shape[:-1], 7)
    s = fused.shrink(x, lora_A)
    fused.expand_(y, s, lora_B, 2.0)
    torch.testing.assert_close(s, x @ lora_A.T)
    torch.testing.assert_close(y, 2.0 * s @ lora_B.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_expand_adds_in_place_into_a_slice(dtype: torch.dtype) -> None:
    whole = torch.randn(2, 3, 12).to(dtype)
    before, expected = whole.clone(), whole[..., 2:9].clone()
    s, lora_B = torch.randn(2, 3, 4).to(dtype), torch.randn(7, 4).to(dtype)
    fused.expand_(whole[..., 2:9], s, lora_B, 0.5)
    reference.expand_(expected, s, lora_B, 0.5)
    torch.testing.assert_close(whole[..., 2:9], expected)
    assert torch.equal(whole[..., :2], before[..., :2])
    assert torch.equal(whole[..., 9:], before[..., 9:])


def test_in_place_ops_reach_a_tensor_without_a_view_of_rows() -> None:
    y = torch.randn(3, 5, 2).permute(2, 1, 0)
    expected = y.clone()
    s, weight = torch.randn(2, 5, 4), torch.randn(3, 4)
    fused.expand_(y, s, weight, 1.0)
    reference.expand_(expected, s, weight, 1.0)
    fused.shrink_dgrad_(y, s, weight.T)
    reference.shrink_dgrad_(expected, s, weight.T)
    torch.testing.assert_close(y, expected)


def test_a_linear_and_its_tokens_may_be_parts_of_others() -> None:
    """The product of the base is torch's, on views that the library makes without torch."""
    x, weight = torch.randn(5, 4, 20)[1:4, :, 3:11], torch.randn(9, 30)[2:8, 5:13]
    lora_A, lora_B = torch.randn(3, 20)[1:, 7:15], torch.randn(6, 9)[:, ::4][:, 1:]
    given = x, weight, lora_A, lora_B
    y, s = fused.linear(*given, 0.5)
    torch.testing.assert_close((y, s), reference.linear(*given, 0.5))
    dy = torch.randn(3, 4, 12)[..., ::2]
    backward = dy, x, s, weight, lora_A, lora_B, 0.5
    torch.testing.assert_close(
        fused.linear_backward(*backward), reference.linear_backward(*backward)
    )


def test_inputs_may_be_strided() -> None:
    x, lora_A = torch.randn(20, 9).T, torch.randn(20, 6)[:, ::2].T
    torch.testing.assert_close(fused.shrink(x, lora_A), x @ lora_A.T)
    torch.testing.assert_close(fused.shrink_wgrad(x[:, :3], x), x[:, :3].T @ x)
    dy = torch.ones(()).expand(9, 20)
    torch.testing.assert_close(
        fused.expand_dgrad(dy, torch.ones(20, 2), 0.5), torch.full((9, 2), 10.0)
    )


def test_a_linear_takes_tokens_of_three_dimensions_and_strided_weights() -> None:
    x, dy = torch.randn(3, 6, 10).transpose(0, 1), torch.randn(3, 6, 7).transpose(0, 1)
    weight, lora_A, lora_B = torch.randn(10, 7).T, torch.randn(10, 4).T, torch.randn(4, 7).T
    y, s = fused.linear(x, weight, lora_A, lora_B, 2.0)
    merged = weight + 2.0 * lora_B @ lora_A
    torch.testing.assert_close((y, s), (x @ merged.T, 2.0 * x @ lora_A.T))
    found = fused.linear_backward(dy, x, s, weight, lora_A, lora_B, 2.0)
    d_merged = dy.flatten(0, 1).T @ x.flatten(0, 1)
    expected = (dy @ merged, 2.0 * lora_B.T @ d_merged, 2.0 * d_merged @ lora_A.T)
    torch.testing.assert_close(found, expected)
    d_a, d_b = torch.ones(10, 4).T, torch.ones(4, 7).T
    fused.linear_backward_(d_a, d_b, dy, x, s, weight, lora_A, lora_B, 2.0)
    torch.testing.assert_close((d_a, d_b), (expected[1] + 1.0, expected[2] + 1.0))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_an_expert_without_tokens_gets_a_gradient_of_exactly_zero(p: float) -> None:
    ends = torch.tensor([0, 4, 4, 9])
    x, s, y = torch.randn(9, 6), torch.randn(9, 2), torch.randn(9, 5)
    d_a = fused.shrink_wgrad(s, x, ends, p=p, seed=SEED)
    d_b = fused.expand_wgrad(y, s, torch.empty(4, 5, 2), 1.0, ends)
    for gradient in (d_a, d_b):
        assert gradient[[0, 2]].count_nonzero() == 0
        assert gradient[[1, 3]].count_nonzero() > 0


def test_rows_past_the_last_offset_belong_to_no_expert() -> None:
    ends = torch.tensor([2, 3])
    x, y = torch.randn(6, 4), torch.randn(6, 5)
    s = fused.shrink(x, torch.randn(2, 3, 4), ends)
    before = y.clone()
    fused.expand_(y, torch.ones(6, 3), torch.ones(2, 5, 3), 1.0, ends)
    assert s[3:].count_nonzero() == 0
    assert torch.equal(y[3:], before[3:])
    torch.testing.assert_close(y[:3], before[:3] + 3.0)


def test_one_a_may_serve_experts_that_each_have_their_b() -> None:
    ends = torch.tensor([3, 3, 8])
    x, lora_A, lora_B = torch.randn(8, 6), torch.randn(4, 6), torch.randn(3, 5, 4)
    y = torch.zeros(8, 5)
    fused.expand_(y, fused.shrink(x, lora_A), lora_B, 1.0, ends)
    owner = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2])
    torch.testing.assert_close(y, torch.einsum("ti,ri,tor->to", x, lora_A, lora_B[owner]))


def test_the_mask_is_the_reference_mask_bit_for_bit() -> None:
    x = torch.ones(37, 19)
    kept = fused.shrink(x, torch.eye(19), p=0.4, seed=SEED) != 0
    assert torch.equal(kept, dropout_mask(x.shape, 0.4, SEED))


def test_forward_and_both_gradients_use_the_same_mask() -> None:
    x, dx = torch.ones(37, 19), torch.zeros(37, 19)
    kept = fused.shrink(x, torch.eye(19), p=0.4, seed=SEED) != 0
    fused.shrink_dgrad_(dx, torch.ones(37, 1), torch.ones(1, 19), p=0.4, seed=SEED)
    d_a = fused.shrink_wgrad(torch.eye(37), x, p=0.4, seed=SEED)
    assert torch.equal(dx != 0, kept)
    assert torch.equal(d_a != 0, kept)


def test_a_strided_gradient_is_added_to_in_place() -> None:
    d_b = torch.randn(2, 7).T
    dy, s, before = torch.randn(5, 7), torch.randn(5, 2), d_b.clone()
    fused.expand_wgrad_(d_b, dy, s, 0.5)
    torch.testing.assert_close(d_b, before + 0.5 * dy.T @ s)


def test_many_small_gradients_add_up_in_fp32_beside_bf16_tokens() -> None:
    """Control: in bf16 the sum stops growing at 256, where one more rounds away."""
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    sums = [torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.bfloat16)]
    for _ in range(400):
        for total in sums:
            fused.shrink_wgrad_(total, ones, ones)
    assert [total.item() for total in sums] == [400.0, 256.0]


def test_the_number_of_threads_changes_no_bit() -> None:
    problem = draw(Case(300, 600, (300, 300), 1, rank=16), torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                fused.expand_backward(problem.y, problem.s, problem.lora_B, 1.0, None, [300, 300])
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))
