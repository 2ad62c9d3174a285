"""What a plan says of work and time: FLOPs by the formula, bytes on links, a floor that holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalora.plan.devices import DEVICES, NETWORKS, Device, Network, device_named, network_named
from tests.support import forked
from tests.support.plans import COMMON, EXPERTS, SIZES, in_a_world, planned

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "NVIDIA-H200"
TOKENS = 8 * 32
# Of SIZES.
H, LAYERS = 64, 4


def counted(flags: Sequence[str]) -> Any:
    """Return the work of a plan of one rank alone, and the FLOPs of a token by formula."""
    with in_a_world(0, 1):
        from megalora.arguments import lora_config_from_args
        from megalora.plan.processes import OWN_SCRIPT
        from megalora.plan.rank import read_rank
        from megalora.plan.script import Built, build
        from megalora.recommend import recommend_for_args

        def read(built: Built) -> Any:
            config = lora_config_from_args(built.args)
            assert config is not None
            formula = recommend_for_args(built.args, config).flops
            return read_rank(0, built, gpus_per_node=8).work, formula

        return build(OWN_SCRIPT, [*COMMON, *SIZES, *flags], read)


@pytest.mark.parametrize("experts", [0, 4])
def test_a_step_has_the_flops_that_the_formula_counts(experts: int) -> None:
    work, formula = forked.call(counted, EXPERTS if experts else ())
    # Megatron's gate computes its weight's gradient, frozen or not.
    gates = 2 * LAYERS * H * experts
    assert work.base + work.adapters == TOKENS * (formula.lora + gates)
    assert work.full - work.attention == TOKENS * formula.full
    assert 0 < work.ratio < 1


@pytest.mark.parametrize("more", [(), ("--recompute-granularity", "selective"), EXPERTS])
def test_full_fine_tuning_by_formula_is_a_plan_of_it(more: tuple[str, ...]) -> None:
    layout = ("--tensor-model-parallel-size", "2", "--sequence-parallel", *more)
    lora, full = planned(0, 2, *layout).work, planned(0, 2, *layout, "--lora-rank", "0").work
    assert lora.full == full.total == full.full
    assert lora.adapters > 0 == full.adapters
    assert sum(one.flops for one in lora.products) == lora.total
    assert bool(lora.recomputed) == bool(more and more is not EXPERTS)


def plan(
    *, flops: int = 0, moved: int = 0, within: int = 0, between: int = 0, state: int = 0
) -> Any:
    """Return what a floor reads of a rank's plan, of four microbatches."""
    from megalora.plan.work import Products, Work

    product = Products(op="aten.mm", part="base", way="forward", calls=1, flops=flops, moved=moved)
    work = Work(base=flops, adapters=0, attention=0, recomputed=0, full=0, products=[product])
    return SimpleNamespace(
        rank=0,
        work=work,
        traffic=[SimpleNamespace(within=within, between=between)],
        memory=SimpleNamespace(gradients=state, optimizer=state),
        step=SimpleNamespace(all_microbatches=4),
    )


SLOW = Device(name="slow", memory=1, flops=10.0, memory_bandwidth=5.0, link_bandwidth=2.0)
WIRE = Network(name="wire", bandwidth=1.0)


def seconds(*plans: Any, stages: int = 1, virtual: int = 1) -> float:
    from megalora.plan.floor import floor

    return floor(plans, SLOW, WIRE, tokens=8, num_gpus=2, stages=stages, virtual=virtual).seconds


def test_the_busiest_resource_decides() -> None:
    assert seconds(plan(flops=100, moved=10)) == 10
    assert seconds(plan(flops=100, moved=100)) == 20, "memory is slower than products"
    assert seconds(plan(flops=100, state=5)) == 14, "the update waits for all gradients"
    assert seconds(plan(flops=100, within=30)) == 15
    assert seconds(plan(flops=100, within=30, between=40)) == 40
    assert seconds(plan(flops=100), plan(flops=300)) == 30, "the slowest rank decides"


def test_a_pipeline_idles_while_it_fills_and_drains() -> None:
    from megalora.plan.floor import floor

    equal = [plan(flops=400), plan(flops=400)]
    # 4 microbatches of 10 s each, and one more for each other stage.
    assert seconds(*equal, stages=3) == 60
    assert seconds(*equal, stages=3, virtual=2) == 50
    found = floor(equal, SLOW, WIRE, tokens=80, num_gpus=8, stages=3)
    assert found.bubble == 2 / 4
    assert (found.tokens_per_second, found.tokens_per_second_per_gpu) == (80 / 60, 10 / 60)
    assert found.utilization == 40 / 60
    # What the shorter stages do hides behind the longest.
    assert seconds(plan(flops=400), plan(flops=200), stages=3) == 40
    assert seconds(plan(flops=400), plan(flops=300), stages=3) == 50


def test_a_ring_sends_what_its_tests_say_and_leaves_a_node_by_all_of_its_ranks() -> None:
    from megalora.plan.traffic import sends

    assert sends("all-gather", 800, 8, nodes=1) == (700, 0)
    assert sends("reduce-scatter", 800, 8, nodes=8) == (0, 700)
    assert sends("all-reduce", 800, 8, nodes=2) == (1050, 350)
    # Of seven others three are here, four there.
    assert sends("all-to-all", 800, 8, nodes=2) == (300, 400)
    assert sends("send", 800, 2, nodes=2) == (0, 800)
    assert sends("receive", 800, 2, nodes=2) == (0, 0)


def test_a_name_that_is_not_known_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"gpu 'h300' is not known: use one of a100, h100"):
        device_named("h300")
    with pytest.raises(ValueError, match=r"network '' is not known: use one of ndr"):
        network_named("")
    assert device_named("H100") is DEVICES["h100"]


LLAMA = (
    *("--num-layers", "8", "--hidden-size", "4096", "--ffn-hidden-size", "14336"),
    *("--num-attention-heads", "32", "--num-query-groups", "8", "--kv-channels", "128"),
    *("--vocab-size", "4096", "--seq-length", "4096", "--max-position-embeddings", "4096"),
    *("--global-batch-size", "1", "--transformer-impl", "transformer_engine"),
    "--use-distributed-optimizer",
)


@pytest.mark.parametrize(("name", "rank"), [("LoRA", "16"), ("full", "0")])
def test_no_step_that_was_measured_is_faster_than_its_floor(name: str, rank: str) -> None:
    from megalora.plan.floor import floor

    lines = (RESULTS / "2026-11-27-2" / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    (row,) = (r for r in rows if r.get("kind") == "dense" and r.get("name") == name)
    found = planned(0, 1, *LLAMA, "--lora-rank", rank)
    least = floor([found], DEVICES["h200"], NETWORKS["ndr"], tokens=4096, num_gpus=1, stages=1)
    assert 0.4 < least.seconds * 1e3 / row["step_ms"] < 0.7
