"""Bytes of weights, gradients and optimizer on each GPU."""

import argparse
import dataclasses
from collections import Counter
from typing import Any

import pytest

from megalora.model.presets import preset_shape
from megalora.model.shape import ModelShape
from megalora.recommend import (
    Layout,
    adapter_parameters,
    gpu_memory,
)
from megalora.recommend.linears import base_parameters
from megalora.recommend.stages import stages_of_layers
from tests.support.sizes import LLAMA, MOE, lora, trainable


def test_full_fine_tuning_takes_eighteen_bytes_for_each_parameter_on_one_gpu() -> None:
    memory = gpu_memory(LLAMA, None, Layout())
    assert memory.total == 18 * base_parameters(LLAMA)


def test_lora_takes_two_bytes_for_the_base_and_eighteen_for_the_adapters() -> None:
    memory = gpu_memory(MOE, lora(32), Layout())
    assert memory.total == 2 * base_parameters(MOE) + 18 * trainable(MOE, lora(32))


def test_adapters_are_divided_by_every_parallel_dimension() -> None:
    layout = Layout(tp=2, dp=4, ep=4, etp=2, pp=1, vocab_multiple=1)
    counts = adapter_parameters(MOE, lora(32))
    dense, experts = counts["attention"] + counts["unembedding"], counts["experts"]
    memory = gpu_memory(MOE, lora(32), layout)
    assert memory.gradients == 4 * (dense / 2 + experts / 8)
    # 8 GPUs hold each expert once and each dense weight four times.
    assert memory.optimizer == 12 * (dense / 8 + experts / 8)


def test_expert_factors_shared_by_all_are_on_every_expert_rank() -> None:
    config = lora(8, expert_mode="shared_outer", targets=("mlp",))
    memory = gpu_memory(MOE, config, Layout(dp=8, ep=8))
    shared = 8 * 48 * (2 * 2048 + 2048)
    own = 8 * 48 * 128 * (2 * 768 + 768)
    assert memory.gradients == 4 * (shared + own / 8)


def test_without_the_distributed_optimizer_every_copy_has_the_whole_state() -> None:
    layout = Layout(dp=4, distributed_optimizer=False)
    assert gpu_memory(LLAMA, None, layout).total == 18 * base_parameters(LLAMA)


def test_pipeline_stages_split_the_layers_and_the_fullest_is_reported() -> None:
    layers, table = base_parameters(LLAMA) - 2 * 128256 * 4096 - 4096, 128256 * 4096
    weights = gpu_memory(LLAMA, None, Layout(pp=4)).weights
    assert weights == 2 * (layers / 4 + table + 4096)


def test_the_last_stage_embeds_the_tokens_of_layers_that_predict_more() -> None:
    predicting = dataclasses.replace(LLAMA, mtp_num_layers=1)
    layers, table = base_parameters(LLAMA) - 2 * 128256 * 4096 - 4096, 128256 * 4096
    own = base_parameters(predicting) - base_parameters(LLAMA)
    assert own == layers / 32 + 2 * 4096 * 4096 + 3 * 4096
    weights = gpu_memory(predicting, None, Layout(pp=4)).weights
    assert weights == 2 * (layers / 4 + own + 2 * table + 4096)


def test_a_tied_table_is_held_once_on_one_stage_and_on_both_ends_of_a_pipeline() -> None:
    tied = preset_shape("llama-3.2-1b")
    assert gpu_memory(tied, None, Layout()).total == 18 * base_parameters(tied)
    layers = base_parameters(tied) - tied.vocab_size * 2048 - 2048
    weights = gpu_memory(tied, None, Layout(pp=2)).weights
    assert weights == 2 * (layers / 2 + tied.vocab_size * 2048 + 2048)


def test_the_vocabulary_is_padded_as_megatron_pads_it() -> None:
    # 151,936 rows are padded to 152,064, and the adapter of the unembedding has as many.
    exact, padded = (gpu_memory(MOE, lora(32), Layout(tp=4, vocab_multiple=n)) for n in (1, 128))
    rows = (152064 - 151936) / 4
    assert padded.weights - exact.weights == 2 * rows * (2 * 2048 + 32)
    assert padded.gradients - exact.gradients == 4 * rows * 32


STAGES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "even": ({}, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]),
    "chunks": (
        {"virtual_pipeline_model_parallel_size": 3},
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3],
    ),
    "first and last": (
        {"decoder_first_pipeline_num_layers": 3, "decoder_last_pipeline_num_layers": 1},
        [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3],
    ),
    "last": ({"decoder_last_pipeline_num_layers": 0}, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
    "last in chunks": (
        {"decoder_last_pipeline_num_layers": 0, "virtual_pipeline_model_parallel_size": 2},
        [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2],
    ),
}


@pytest.mark.parametrize("case", STAGES)
def test_layers_stand_where_megatrons_flags_put_them(case: str) -> None:
    flags, expected = STAGES[case]
    args = argparse.Namespace(num_layers=12, pipeline_model_parallel_size=4, **flags)
    assert stages_of_layers(args) == tuple(expected)


def test_the_embedding_and_the_loss_may_count_as_layers() -> None:
    args = argparse.Namespace(
        num_layers=126,
        pipeline_model_parallel_size=16,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    )
    counts = Counter(stages_of_layers(args))
    assert [counts[stage] for stage in range(16)] == [7, *[8] * 14, 7]


@pytest.mark.parametrize(
    ("shape", "sizes", "message"),
    [
        (LLAMA, {"tp": 3}, "tp 3 does not divide"),
        (LLAMA, {"dp": 2, "ep": 2}, "0 experts"),
        (LLAMA, {"pp": 33}, "pp 33 exceeds"),
        (MOE, {"ep": 8}, "ep 8 x etp 1 does not divide"),
        (MOE, {"ep": 3, "dp": 3}, "128 experts"),
        (MOE, {"tp": 0}, "tp is 0"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(
    shape: ModelShape, sizes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gpu_memory(shape, lora(8), Layout(**sizes))
