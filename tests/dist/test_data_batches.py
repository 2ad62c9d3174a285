"""Batches: boundaries, sharding and resumption by Megatron's own loaders, models and schedules."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.datasets import data_samplers

from megalora.data import ByteTokenizer, PackedDataset, batch
from megalora.data.arguments import AttentionFormat
from megalora.data.examples import encode_rows, gather_examples
from megalora.data.tokenizers import encoder_for
from tests.dist.support.layouts import Layout, model_parallel, one_rank, over
from tests.dist.support.models import MOE, build_model
from tests.dist.support.route import as_args, route_args

SEQ_LENGTH = 64
VOCAB_SIZE = 264
NUM_SAMPLES = 8
# Balancing makes the routers look at the padding mask.
BALANCED = {**MOE, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "sliding window": {"window_size": (5, 0)},
    "moe": BALANCED,
}


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """Return questions and answers of many lengths, two or three to a sequence."""
    words = "the quick brown fox jumps over a lazy dog".split()  # noqa: SIM905
    return [
        {"prompt": f"{k} {words[k % 9]}?", "completion": " ".join(words[k % 4 : k % 4 + 1 + k % 5])}
        for k in range(24)
    ]


def dataset_of(rows: list[dict[str, str]], **options: Any) -> PackedDataset:
    encoder = encoder_for(ByteTokenizer())
    examples = gather_examples(encode_rows(rows, "completion", encoder, SEQ_LENGTH), "these rows")
    return PackedDataset(examples, SEQ_LENGTH, encoder.pad_id, **options)


@pytest.fixture
def args() -> Iterator[SimpleNamespace]:
    """Give Megatron's functions the arguments that they look at."""
    args = route_args(micro_batch_size=2, global_batch_size=NUM_SAMPLES)
    with as_args(args):
        yield args


def loader_of(dataset: PackedDataset, consumed: int = 0) -> Iterator[dict[str, torch.Tensor]]:
    loader: Any = data_samplers.build_pretraining_data_loader(dataset, consumed)
    return iter(loader)


def losses_by_context(
    dataset: PackedDataset, attention: AttentionFormat, kind: str
) -> dict[tuple[int, ...], float]:
    """Return the loss of every trained token under the tokens before it in its example."""
    (model,) = build_model(Layout(), vocab_size=VOCAB_SIZE, seq_length=SEQ_LENGTH, **KINDS[kind])
    groups: dict[str, Any] = {
        "tp_group": parallel_state.get_tensor_model_parallel_group(),
        "cp_group": parallel_state.get_context_parallel_group(),
    }
    found = {}
    for sample in torch.utils.data.DataLoader(dataset, batch_size=2):
        b = batch.get_batch(iter([sample]), attention, **groups)
        with torch.no_grad():
            losses = model(
                b.tokens,
                b.position_ids,
                b.attention_mask,
                labels=b.labels,
                packed_seq_params=b.packed_seq_params,
            )
        tokens, positions, losses = b.tokens.view(-1), b.position_ids.view(-1), losses.view(-1)
        for place in b.loss_mask.view(-1).nonzero().view(-1).tolist():
            context = tokens[place - int(positions[place]) : place + 1]
            found[(*context.tolist(), int(b.labels.view(-1)[place]))] = float(losses[place])
    return found


@pytest.mark.world_1
@pytest.mark.parametrize("kind", KINDS)
def test_packed_and_unpacked_give_the_same_loss_for_every_token(
    rows: list[dict[str, str]], kind: str
) -> None:
    with model_parallel(Layout()):
        expected = losses_by_context(dataset_of(rows, packing=False), "padded", kind)
        packed = dataset_of(rows)
        assert len(packed) < 0.7 * len(rows)
        for attention in ("mask", "thd"):
            found = losses_by_context(packed, attention, kind)
            assert found.keys() == expected.keys()
            for context, loss in found.items():
                assert loss == pytest.approx(expected[context], abs=2e-5)
        blind = losses_by_context(packed, "padded", kind)
        worst = max(abs(blind[context] - expected[context]) for context in expected)
        assert worst > 0.05, "examples that see each other must change the losses"


def batch_loss(
    iterator: Iterator[dict[str, torch.Tensor]] | None,
    num_microbatches: int,
    layout: Layout,
    args: SimpleNamespace,
    kind: str,
) -> torch.Tensor:
    """Return [2], summed loss and trained tokens on this rank, by Megatron's schedule."""
    args.num_experts = KINDS[kind].get("num_moe_experts")
    args.sequence_parallel = layout.sp
    fields: dict[str, Any] = {**KINDS[kind], "calculate_per_token_loss": True}
    (chunk,) = build_model(layout, vocab_size=VOCAB_SIZE, seq_length=SEQ_LENGTH, **fields)
    # Megatron refuses to train experts under tensor parallelism without sequence parallelism.
    chunk.train(layout.sp or layout.tp == 1)
    source: Any = [iterator]
    results: Any = get_forward_backward_func()(
        forward_step_func=batch.forward_step,
        data_iterator=source,
        model=[chunk],
        num_microbatches=num_microbatches,
        seq_length=SEQ_LENGTH,
        micro_batch_size=args.micro_batch_size,
        forward_only=True,
    )
    return sum((result["lm loss"] for result in results), torch.zeros(2))


@over(
    Layout(dp=2),
    Layout(tp=2),
    Layout(tp=2, sp=True),
    Layout(cp=2),
    Layout(pp=2),
    Layout(tp=2, sp=True, cp=2),
    Layout(tp=2, sp=True, pp=2),
)
@pytest.mark.parametrize(
    ("kind", "attention"),
    [("dense", "mask"), ("dense", "thd"), ("dense", "padded"), ("moe", "padded")],
)
def test_every_layout_sees_the_same_batch(
    layout: Layout,
    kind: str,
    attention: AttentionFormat,
    rows: list[dict[str, str]],
    args: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch, "attention_format", lambda _: attention)
    if attention == "thd" and layout.pp > 1:
        args.micro_batch_size = 1  # what `attention_format` asks for
    data = dataset_of(
        rows,
        packing=attention != "padded",
        pad_multiple=2 * layout.cp if attention == "thd" and layout.cp > 1 else 1,
        num_samples=NUM_SAMPLES,
    )
    num_microbatches = NUM_SAMPLES // args.micro_batch_size
    alone = one_rank(layout)
    with model_parallel(alone):
        everything = iter(torch.utils.data.DataLoader(data, batch_size=args.micro_batch_size))
        expected = batch_loss(everything, num_microbatches, alone, args, kind)
    with model_parallel(layout):
        reads = parallel_state.get_tensor_model_parallel_rank() == 0
        iterator = loader_of(data) if reads else None
        found = batch_loss(iterator, num_microbatches // layout.dp, layout, args, kind)
        # Tensor-parallel ranks hold the same sums, so one of each group counts.
        found *= reads
        dist.all_reduce(found)
    assert expected[1] > 100
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def tokens_read(dataset: PackedDataset, consumed: int = 0) -> list[list[int]]:
    return [row for sample in loader_of(dataset, consumed) for row in sample["tokens"].tolist()]


@over(Layout(dp=2))
def test_megatrons_loader_shards_and_resumes_by_consumed_samples(
    layout: Layout, rows: list[dict[str, str]], args: SimpleNamespace
) -> None:
    data = dataset_of(rows, packing=False, num_samples=3 * len(rows))  # three epochs
    with model_parallel(layout):
        dp_rank = parallel_state.get_data_parallel_rank()
        straight = tokens_read(data)
        step = args.micro_batch_size * layout.dp
        mine = [
            data[i + 2 * dp_rank + k]["tokens"].tolist()
            for i in range(0, len(data), step)
            for k in range(2)
        ]
        assert straight == mine
        consumed = 7 * step
        resumed = tokens_read(dataset_of(rows, packing=False, num_samples=3 * len(rows)), consumed)
        assert resumed == straight[7 * args.micro_batch_size :]


@pytest.mark.world_1
def test_a_validation_set_gets_the_evaluation_batch_size(
    rows: list[dict[str, str]], args: SimpleNamespace
) -> None:
    args.eval_micro_batch_size, args.eval_global_batch_size = 4, 8
    with model_parallel(Layout()):
        for split, size in (("train", 2), ("valid", 4)):
            sample = next(loader_of(dataset_of(rows, num_samples=8, split_name=split)))
            assert len(sample["tokens"]) == size


@pytest.mark.world_1
def test_padding_is_hidden_from_routers_and_examples_are_not(rows: list[dict[str, str]]) -> None:
    with model_parallel(Layout()):
        data = dataset_of(rows, packing=False)
        sample = next(iter(torch.utils.data.DataLoader(data, batch_size=4)))
        b = batch.get_batch(
            iter([sample]),
            "padded",
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            cp_group=parallel_state.get_context_parallel_group(),
        )
    assert torch.equal(b.padding_mask, b.tokens == ByteTokenizer.pad)


@over(Layout(tp=2, sp=True))
def test_later_pipeline_stages_get_their_sequence_shard_of_the_padding(layout: Layout) -> None:
    padding = torch.arange(8)[None] > 4
    with model_parallel(layout):
        for is_first in (True, False):
            model = SimpleNamespace(pre_process=is_first)
            part = batch.padding_of_stage(padding, model, sequence_parallel=True)
            shard = padding.view(2, 4)[parallel_state.get_tensor_model_parallel_rank()][None]
            assert torch.equal(part, padding if is_first else shard)
        assert batch.padding_of_stage(padding, model, sequence_parallel=False) is padding


@pytest.mark.bad_input("a number that is not one")
@over(Layout())
def test_a_loss_that_is_not_finite_stops_the_run(layout: Layout, args: SimpleNamespace) -> None:
    mask = torch.tensor([1.0, 0.0])
    with model_parallel(layout):
        for value in (float("nan"), float("inf")):
            with pytest.raises(RuntimeError, match="loss that is not finite"):
                batch.loss_func(mask, mask.sum(), torch.tensor([value, 0.0]))
