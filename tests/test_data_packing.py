"""Packing: rows, masks, positions and boundaries, and the order that samples come in."""

import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalora.data.examples import Examples
from megalora.data.packing import PackedDataset, pack

PAD = 99


def examples_of(lengths: list[int]) -> Examples:
    """Return examples of `lengths` positions whose ids count on from 1000 * number."""
    ids = [1000 * k + np.arange(length + 1) for k, length in enumerate(lengths)]
    offsets = np.cumsum([0, *(len(example) for example in ids)])
    flat = np.concatenate(ids).astype(np.int32)
    return Examples(flat, flat % 1000 > 0, offsets)


def dataset_of(lengths: list[int], seq_length: int = 8, **options) -> PackedDataset:
    return PackedDataset(examples_of(lengths), seq_length, PAD, **options)


lengths_and_row = st.integers(1, 40).flatmap(
    lambda s: st.tuples(st.lists(st.integers(1, s), min_size=1, max_size=60), st.just(s))
)


@settings(max_examples=80, deadline=None)
@given(lengths_and_row, st.randoms(use_true_random=False))
def test_every_example_is_packed_whole_and_once(case, shuffler) -> None:
    lengths, seq_length = case
    order = list(range(len(lengths)))
    shuffler.shuffle(order)
    rows = pack(np.array(lengths), seq_length, order=np.array(order))
    assert sorted(example for row in rows for example in row) == sorted(order)
    assert all(sum(lengths[example] for example in row) <= seq_length for row in rows)


@settings(max_examples=80, deadline=None)
@given(lengths_and_row)
def test_no_two_rows_would_fit_into_one(case) -> None:
    lengths, seq_length = case
    rows = pack(np.array(lengths), seq_length, order=np.arange(len(lengths)))
    used = sorted(sum(lengths[example] for example in row) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > seq_length


def test_packing_many_short_examples_fills_rows() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 5000)
    rows = pack(lengths, 256, order=np.arange(5000))
    assert lengths.sum() / (256 * len(rows)) > 0.93


def test_more_open_rows_than_the_limit_close_the_fullest() -> None:
    lengths = np.array([5] * 300 + [4] * 300)
    rows = pack(lengths, 9, order=np.arange(600))
    assert sum(lengths[row].sum() == 9 for row in rows) == 256


@settings(max_examples=60, deadline=None)
@given(lengths_and_row, st.booleans(), st.sampled_from([1, 2, 4]))
def test_a_sample_holds_its_examples_and_nothing_else(case, packing, multiple) -> None:
    lengths, seq_length = case
    seq_length = -(-seq_length // multiple) * multiple
    data = dataset_of(lengths, seq_length, packing=packing, pad_multiple=multiple)
    seen = []
    for sample in (data[i] for i in range(len(data))):
        bounds = sample["cu_seqlens"].unique().tolist()
        assert bounds[0] == 0
        assert bounds[-1] == seq_length
        assert int(sample["max_seqlen"]) == max(np.diff(bounds))
        for start, end in pairwise(bounds):
            assert (end - start) % multiple == 0
            assert sample["position_ids"][start:end].tolist() == list(range(end - start))
            trained = sample["loss_mask"][start:end].bool()
            if sample["padding_mask"][start]:
                assert not trained.any()
                assert set(sample["tokens"][start:end].tolist()) == {PAD}
                continue
            number = int(sample["tokens"][start]) // 1000
            seen.append(number)
            length = lengths[number]
            assert trained.tolist() == [True] * length + [False] * (end - start - length)
            expected = 1000 * number + np.arange(length + 1)
            assert sample["tokens"][start : start + length].tolist() == expected[:-1].tolist()
            assert sample["labels"][start : start + length].tolist() == expected[1:].tolist()
    assert sorted(seen) == list(range(len(lengths)))


def test_without_packing_each_sample_is_one_padded_example() -> None:
    data = dataset_of([3, 2], packing=False, shuffle=False)
    assert len(data) == 2
    assert data[1]["tokens"].tolist() == [1000, 1001, PAD, PAD, PAD, PAD, PAD, PAD]
    assert data[1]["loss_mask"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert data[1]["padding_mask"].tolist() == [False] * 2 + [True] * 6


def test_only_targets_that_are_trained_count() -> None:
    examples = examples_of([4])
    examples.trained[:] = [False, False, True, False, True]
    sample = PackedDataset(examples, 4, PAD)[0]
    assert sample["loss_mask"].tolist() == [0, 1, 0, 1]


def order_of(data: PackedDataset, epoch: int) -> list[int]:
    n = len(data.rows)
    return [int(data[i]["tokens"][0]) for i in range(epoch * n, (epoch + 1) * n)]


def test_every_epoch_has_every_row_in_another_order() -> None:
    data = dataset_of([8] * 20, num_samples=60)
    orders = [order_of(data, epoch) for epoch in range(3)]
    assert all(sorted(order) == [1000 * k for k in range(20)] for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_the_order_depends_on_the_seed_only() -> None:
    same, other = dataset_of([8] * 20, num_samples=40), dataset_of([8] * 20, num_samples=40, seed=7)
    first = dataset_of([8] * 20, num_samples=40)
    assert order_of(first, 1) == order_of(same, 1)
    assert order_of(first, 1) != order_of(other, 1)


def test_a_longer_run_begins_as_the_shorter_one() -> None:
    short, long = dataset_of([8] * 20, num_samples=20), dataset_of([8] * 20, num_samples=100)
    assert order_of(short, 0) == order_of(long, 0)


def test_samples_do_not_depend_on_what_was_read_before() -> None:
    straight, resumed = dataset_of([8] * 20, num_samples=60), dataset_of([8] * 20, num_samples=60)
    for index in range(30):
        straight[index]
    for index in (30, 59, 41):
        assert torch.equal(straight[index]["tokens"], resumed[index]["tokens"])


def test_validation_keeps_its_order_and_starts_again_at_its_end() -> None:
    data = dataset_of([8] * 5, num_samples=12, shuffle=False)
    assert [int(data[i]["tokens"][0]) // 1000 for i in range(12)] == [0, 1, 2, 3, 4] * 2 + [0, 1]


def test_a_dataset_survives_the_way_to_a_loader_process() -> None:
    data = dataset_of([8] * 20, num_samples=40)
    copy = pickle.loads(pickle.dumps(data))
    assert order_of(copy, 1) == order_of(data, 1)


def test_an_index_behind_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="sample 20 of 20"):
        dataset_of([8] * 20)[20]
