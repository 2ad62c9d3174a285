"""Batches: boundaries, sharding and resumption by Megatron's own loaders, models and schedules."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tokenizers import MegatronTokenizer
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import global_vars
from megatron.training.arguments import parse_args
from megatron.training.datasets import data_samplers

from megalora.data import ByteTokenizer, PackedDataset, add_data_args, attention_format, batch
from megalora.data.arguments import AttentionFormat, check_data_args, tokenizer_from_args
from megalora.data.examples import encode_rows, gather_examples
from megalora.data.tokenizers import encoder_for
from megalora.training import patches
from tests.dist.layouts import Layout, model_parallel, one_rank, over
from tests.dist.models import MOE, build_model

SEQ_LENGTH = 64
VOCAB_SIZE = 264
NUM_SAMPLES = 8
# Balancing makes the routers look at the padding mask.
BALANCED = {**MOE, "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01}
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "moe": BALANCED}


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
def args(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Give Megatron's functions the arguments that they look at."""
    args = SimpleNamespace(
        micro_batch_size=2,
        global_batch_size=NUM_SAMPLES,
        dataloader_type="single",
        full_validation=False,
        hybrid_context_parallel=False,
        num_workers=0,
        exit_signal_handler=False,
        check_for_nan_in_loss_and_grad=True,
        calculate_per_token_loss=True,
        num_experts=None,
        moe_router_load_balancing_type="none",
        sequence_parallel=False,
    )
    timer = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(batch, "get_args", lambda: args)
    monkeypatch.setattr(batch, "get_timers", lambda: lambda name, log_level=0: timer)
    monkeypatch.setattr(data_samplers, "get_args", lambda: args)
    return args


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
            part = batch._padding_mask(padding, model, sequence_parallel=True)
            shard = padding.view(2, 4)[parallel_state.get_tensor_model_parallel_rank()][None]
            assert torch.equal(part, padding if is_first else shard)
        assert batch._padding_mask(padding, model, sequence_parallel=False) is padding


@over(Layout())
def test_a_loss_that_is_not_finite_stops_the_run(layout: Layout, args: SimpleNamespace) -> None:
    mask = torch.tensor([1.0, 0.0])
    with model_parallel(layout):
        for value in (float("nan"), float("inf")):
            with pytest.raises(RuntimeError, match="loss that is not finite"):
                batch.loss_func(mask, mask.sum(), torch.tensor([value, 0.0]))


@pytest.mark.world_1
def test_megatrons_own_parser_and_tokenizers_take_the_byte_tokenizer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = "--dataset stdlib-docstrings --byte-tokenizer --no-packing"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    args: Any = parse_args(extra_args_provider=add_data_args)
    args.rank = 0
    assert build_tokenizer(args).vocab_size == ByteTokenizer.vocab_size
    assert build_tokenizer(args).eod == ByteTokenizer.eos
    assert args.padded_vocab_size == 384
    assert isinstance(tokenizer_from_args(args), ByteTokenizer)
    assert (args.dataset, args.packing) == ("stdlib-docstrings", False)


@pytest.mark.world_1
def test_a_run_without_a_tokenizer_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.install(patches.PARSING)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    remedies = {
        add_data_args: ", or --byte-tokenizer",
        lambda parser: parser: "--tokenizer-model DIR$",
    }
    for add, remedy in remedies.items():
        with pytest.raises(ValueError, match=rf"tokenizer_type is not given: set .*{remedy}"):
            global_vars.build_tokenizer(parse_args(extra_args_provider=add))


@pytest.mark.world_1
def test_the_attention_format_follows_what_the_attention_can(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    args = argparse.Namespace(
        dataset="any",
        packing=True,
        transformer_impl="transformer_engine",
        pipeline_model_parallel_size=2,
        context_parallel_size=1,
        micro_batch_size=2,
        multi_latent_attention=False,
        window_size=None,
        softmax_type="vanilla",
    )
    assert attention_format(args) == "mask"  # on the CPU
    monkeypatch.setattr("megatron.core.extensions.transformer_engine.HAVE_TE", True)
    monkeypatch.setattr("megalora.cpu.installed", lambda: False)
    with pytest.raises(ValueError, match="micro_batch_size 2 with packing and 2 pipeline stages"):
        attention_format(args)
    args.micro_batch_size = 1
    assert attention_format(args) == "thd"
    args.hybrid_layer_pattern = "M*"
    assert attention_format(args) == "thd"
    args.transformer_impl = "local"
    with pytest.raises(ValueError, match=r"'M\*' with packed examples.*set --no-packing"):
        attention_format(args)
    args.hybrid_layer_pattern = None
    assert attention_format(args) == "thd"
    for name, value in (("window_size", (8, 0)), ("multi_latent_attention", True)):
        before = getattr(args, name)
        setattr(args, name, value)
        assert attention_format(args) == "mask"
        setattr(args, name, before)


@pytest.mark.world_1
def test_masks_that_no_memory_holds_are_refused() -> None:
    args = argparse.Namespace(
        dataset="/gone",
        dataloader_type="single",
        rank=1,
        packing=True,
        transformer_impl="local",
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        micro_batch_size=1,
        seq_length=10**6,
        num_layers=1,
        recompute_granularity=None,
        multi_latent_attention=False,
        window_size=None,
        softmax_type="vanilla",
    )
    check_data_args(args)  # boundaries are enough
    args.multi_latent_attention = True
    with pytest.raises(ValueError, match=r"seq_length 1000000 needs 4657 GiB of attention masks"):
        check_data_args(args)
    args.packing = False
    check_data_args(args)
    args.context_parallel_size = 2
    with pytest.raises(
        ValueError, match=r"needs 2328 GiB .*--context-parallel-size 1 and --no-pack"
    ):
        check_data_args(args)


@pytest.mark.world_1
def test_mamba_is_told_which_example_a_token_is_of() -> None:
    packed = batch.packed_params(torch.tensor([0, 3, 4, 6]), None)
    assert packed.seq_idx.tolist() == [[0, 0, 0, 1, 2, 2]]


@pytest.mark.world_1
def test_megatrons_own_datasets_keep_working(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "text.bin"), dtype=np.int32)
    for start in range(40):
        builder.add_document(torch.tensor([*range(start, start + 10), 99]), [11])
    builder.finalize(str(tmp_path / "text.idx"))
    flags = f"--data-path {tmp_path / 'text'} --split 80,10,10 --seq-length 32 --seed 1"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split(), "--reset-attention-mask"])
    args: Any = parse_args(extra_args_provider=add_data_args)
    megatron_tokenizer: Any = MegatronTokenizer
    tokenizer = megatron_tokenizer.from_pretrained(
        metadata_path={"library": "null-text"}, vocab_size=128, eod_id=99, pad_id=0
    )
    monkeypatch.setattr(batch, "get_args", lambda: args)
    monkeypatch.setattr(batch, "get_tokenizer", lambda: tokenizer)
    with model_parallel(Layout()):
        check_data_args(args)
        train, valid, _ = batch.datasets_provider([8, 2, 0])
    assert (len(train) >= 8, train.split, valid.split) == (True, Split.train, Split.valid)
    sample = train[0]
    assert sample["labels"][:-1].tolist() == sample["tokens"][1:].tolist()
    bounds = sample["cu_seqlens"].unique().tolist()
    assert [int(sample["tokens"][end - 1]) for end in bounds[1:-1]] == [99] * (len(bounds) - 2)
    assert len(bounds) > 3
