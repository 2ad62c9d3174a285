"""What benchmarks/bench_model.py calls a step is a step of Megatron's training."""

import dataclasses
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.forked import ROOT, call

GIB = 2**30


def measured() -> dict[str, Any]:
    """Do two steps with each model at toy size; return what changed, and what fits on GPUs."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bench_model
    import torch

    bench_model.start_one_process()
    options = SimpleNamespace(
        kind="moe", layers=None, seq_length=8, micro_batch_size=2, rank=4, toy=True, rounds=2
    )
    size = bench_model.size_of(options, "cpu")
    found: dict[str, Any] = {"tokens": size.num_tokens}
    for name in bench_model.KINDS:
        subject = bench_model.Subject(name, options.rank, size, "cpu")
        named = dict(subject.model.named_parameters())
        before = {key: value.detach().clone() for key, value in named.items()}
        if name == "frozen":
            matrices = [p for key, p in named.items() if p.dim() == 2 and "router" not in key]
            found["counted"] = sum(p.numel() for p in matrices), size.num_weights
        times = [subject.step(), subject.step()]
        changed = {key for key, old in before.items() if not torch.equal(old, named[key])}
        trained = {key for key, value in named.items() if value.requires_grad}
        found[name] = {
            "changed": changed,
            "trained": trained,
            "times": times,
        }
        if subject.optimizer:
            found[name] |= {
                "fp32": subject.model.ddp_config.grad_reduce_in_fp32,
                "fused": {
                    value.grad_added_to_main_grad
                    for value in named.values()
                    if value.dim() > 1 and value.requires_grad
                },
                "clipped": subject.optimizer.config.clip_grad,
            }
    found["rows"] = bench_model.rows_of(
        list(bench_model.measured([("frozen", "LoRA")], options, size, "cpu")), size.num_tokens
    )
    real = bench_model.SIZES["qwen3-30b-a3b"]
    found["fit"] = {gib: bench_model.that_fit(real, gib * GIB) for gib in (139, 110, 78)}
    whole = dataclasses.replace(real, num_layers=48)
    found["whole fit"] = {gib: bench_model.that_fit(whole, gib * GIB) for gib in (139, 78)}
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return call(measured)


def test_a_frozen_step_updates_nothing(found: dict[str, Any]) -> None:
    assert found["frozen"]["changed"] == found["frozen"]["trained"] == set()
    assert all(times["optimizer_ms"] < times["step_ms"] / 10 for times in found["frozen"]["times"])


def test_a_lora_step_updates_every_adapter_and_nothing_else(found: dict[str, Any]) -> None:
    assert found["LoRA"]["changed"] == found["LoRA"]["trained"]
    assert found["LoRA"]["changed"]
    assert all("lora_" in name for name in found["LoRA"]["changed"])


def test_a_full_step_updates_every_weight(found: dict[str, Any]) -> None:
    assert found["full"]["changed"] == found["full"]["trained"]
    assert any("experts" in name for name in found["full"]["changed"])


@pytest.mark.parametrize("name", ["LoRA", "full"])
def test_backward_adds_to_main_grads_in_fp32_which_are_clipped(
    found: dict[str, Any], name: str
) -> None:
    assert found[name]["fp32"]
    assert found[name]["fused"] >= {True}
    assert found[name]["clipped"] == 1.0


def test_a_step_is_the_sum_of_its_phases(found: dict[str, Any]) -> None:
    for name in ("frozen", "LoRA", "full"):
        for times in found[name]["times"]:
            phases = [times[key] for key in ("zero_ms", "forward_backward_ms", "optimizer_ms")]
            assert times["step_ms"] == pytest.approx(sum(phases))


def test_microbatch_and_length_make_the_tokens_of_a_step(found: dict[str, Any]) -> None:
    assert found["tokens"] == 16


def test_without_the_full_model_its_ratios_are_left_out(found: dict[str, Any]) -> None:
    frozen, lora = found["rows"]
    assert (frozen["name"], lora["name"]) == ("frozen", "LoRA")
    assert "over_frozen" in lora
    assert not {"over_full", "step_over_full"} & set(lora)


def test_the_weights_of_a_model_are_counted_before_it_is_built(found: dict[str, Any]) -> None:
    counted, foreseen = found["counted"]
    assert counted == foreseen


def test_what_does_not_fit_on_a_gpu_together_is_measured_apart_or_left_out(
    found: dict[str, Any],
) -> None:
    assert found["fit"][139] == [("frozen", "LoRA", "full")]
    assert found["fit"][110] == [("frozen", "LoRA"), ("full",)]
    assert found["fit"][78] == [("frozen", "LoRA")]
    assert found["whole fit"] == {139: [("frozen",), ("LoRA",)], 78: []}
