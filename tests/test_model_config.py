"""One config.json means the same to recommendations, flags, base loading and `--lr auto`."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalora.config import LoRAConfig
from megalora.hf.cuts import Placement, Shard
from megalora.hf.weights import Weights
from megalora.model.arguments import args_shape
from megalora.model.config_json import read_config
from megalora.model.megatron import megatron_args
from megalora.model.shape import ModelShape
from megalora.recommend import add_parser, recommend_for_args
from megalora.training.flags import with_hf_flags
from tests.support.sizes import RUN, TINY_GLM, TINY_LLAMA, TINY_MOE, TINY_QWEN2_MOE

QWEN3 = {**TINY_LLAMA, "model_type": "qwen3"}
LONG = {"rope_type": "longrope", "factor": 4.0}
MAPPED = [
    TINY_LLAMA,
    {**TINY_LLAMA, "tie_word_embeddings": True},
    {**TINY_LLAMA, "attention_bias": False, "head_dim": None},
    {**TINY_LLAMA, "num_key_value_heads": None},
    {**QWEN3, "num_key_value_heads": None},
    {**TINY_LLAMA, "model_type": "qwen2", "attention_bias": True},
    {**QWEN3, "head_dim": 24},
    {**TINY_LLAMA, "model_type": "mistral", "sliding_window": None},
    {**TINY_LLAMA, "model_type": "mistral", "sliding_window": 5},
    TINY_MOE,
    TINY_QWEN2_MOE,
    TINY_GLM,
    {**TINY_GLM, "first_k_dense_replace": 0, "n_shared_experts": 0, "n_group": 1},
    {**TINY_MOE, "model_type": "mixtral"},
    {**TINY_MOE, "num_experts": None, "num_local_experts": 8, "decoder_sparse_step": 2},
]
SIZES_ALONE = [
    ({**TINY_LLAMA, "attention_bias": True}, "attention_bias is True"),
    ({**QWEN3, "attention_bias": True}, "attention_bias is True"),
    ({**QWEN3, "use_sliding_window": True}, "use_sliding_window is True"),
    ({**TINY_LLAMA, "hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({**TINY_LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5: 1 is"),
    ({**TINY_GLM, "norm_topk_prob": False}, "norm_topk_prob is False with num_experts_per_tok 4"),
    ({**TINY_GLM, "num_experts_per_tok": 1}, "norm_topk_prob is True with num_experts_per_tok 1"),
    ({**TINY_GLM, "topk_group": 1}, "topk_group is 1 of 4 with num_experts_per_tok 4"),
    ({**TINY_GLM, "n_group": "4"}, "n_group is '4'"),
    ({**TINY_GLM, "routed_scaling_factor": -1}, "routed_scaling_factor is -1"),
    ({**TINY_LLAMA, "rope_scaling": LONG}, "rope_type is 'longrope'"),
    ({**TINY_LLAMA, "rope_scaling": "yarn"}, "rope_scaling is 'yarn': must be an object"),
]
IMPOSSIBLE = [
    ({"model_type": "llama"}, "num_attention_heads is None: must be an integer >= 1"),
    ({**TINY_LLAMA, "num_key_value_heads": 0}, "num_key_value_heads is 0: must be an integer"),
    ({**TINY_LLAMA, "num_key_value_heads": "2"}, "num_key_value_heads is '2'"),
    (
        {**TINY_LLAMA, "num_key_value_heads": 3},
        "num_attention_heads 4 is not divisible by num_query_groups 3",
    ),
    (
        {**TINY_LLAMA, "hidden_size": 30, "head_dim": None},
        "hidden_size 30 is not divisible by num_attention_heads 4, and no size of a head is given",
    ),
    ({**TINY_LLAMA, "head_dim": 0}, "head_dim is 0"),
    (
        {**TINY_LLAMA, "model_type": "mistral", "sliding_window": 0},
        "sliding_window is 0: must be an integer >= 1",
    ),
    (
        {**TINY_LLAMA, "model_type": "mistral", "sliding_window": "4096"},
        "sliding_window is '4096'",
    ),
    ({**TINY_LLAMA, "num_hidden_layers": 2.0}, "num_hidden_layers is 2.0"),
    ({**TINY_LLAMA, "vocab_size": True}, "vocab_size is True"),
    ({**TINY_MOE, "num_experts": 0}, "num_experts is 0"),
    ({**TINY_MOE, "moe_intermediate_size": None}, "moe_intermediate_size is None"),
    ({**TINY_MOE, "num_experts_per_tok": 9}, "moe_router_topk 9 exceeds num_moe_experts 4"),
    ({**TINY_MOE, "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ({**TINY_MOE, "mlp_only_layers": 3}, "mlp_only_layers is 3: must be a list"),
    (
        {**TINY_LLAMA, "model_type": "gpt2"},
        "model_type is 'gpt2': supported are deepseek_v3, glm4_moe, glm4_moe_lite, gpt_oss",
    ),
    ({**TINY_LLAMA, "model_type": ["llama"]}, r"model_type is ['llama']"),
    ([TINY_LLAMA], "holds a JSON list, expected an object"),
    (None, "config.json does not exist"),
]


def command(*arguments: str) -> argparse.Namespace:
    """Parse a line of `megalora recommend`, flags that are not of sizes left out."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_known_args(["recommend", "--rank", "4", *arguments])[0]


def recommended(directory: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return what `megalora recommend` prints."""
    args = command("--model", directory, "--json")
    args.func(args)
    return json.loads(capsys.readouterr().out)


def auto_rate(directory: str) -> ModelShape:
    """Return the sizes that `--lr auto` goes by."""
    run = argparse.Namespace(**RUN, hf_model=directory)
    return recommend_for_args(run, LoRAConfig(rank=4)).shape


def flags(directory: str) -> ModelShape:
    """Return the sizes of the flags that --hf-model stands for."""
    printed = with_hf_flags(["--hf-model", directory])
    return args_shape(command(*printed[:-2]), family=auto_rate(directory).family)


def loading(directory: str) -> ModelShape:
    """Return the sizes by which base weights are loaded."""
    config = read_config(directory)
    megatron_args(config)
    return Weights(config, Placement(Shard(), Shard(), Shard())).shape


def refusal(read: Callable[[str], object], directory: str) -> str:
    with pytest.raises(ValueError, match=r"\w") as caught:
        read(directory)
    return str(caught.value)


@pytest.fixture
def directory(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Return a directory with the test's `config` as its config.json, without one for None."""
    config = request.getfixturevalue("config")
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize("config", MAPPED)
def test_all_read_the_same_sizes(
    config: dict[str, Any], directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = loading(directory)
    assert shape.unmapped == ""
    assert auto_rate(directory) == shape
    assert flags(directory) == shape
    sizes = recommended(directory, capsys)["model"]
    dense = [layer for layer in range(2) if layer not in shape.moe_layers]
    assert sizes["dense_layers"] == (dense if shape.num_moe_experts else [])
    assert (sizes["num_query_groups"], sizes["kv_channels"], sizes["num_experts"]) == (
        shape.num_query_groups,
        shape.kv_channels,
        shape.num_moe_experts,
    )


@pytest.mark.parametrize(("config", "sentence"), SIZES_ALONE)
def test_what_cannot_be_exchanged_is_recommended_for_and_says_the_same_sentence(
    config: dict[str, Any], sentence: str, directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = auto_rate(directory)
    assert sentence in shape.unmapped
    assert refusal(flags, directory) == refusal(loading, directory) == shape.unmapped
    assert any(shape.unmapped in note for note in recommended(directory, capsys)["notes"])


@pytest.mark.bad_input("a malformed file")
@pytest.mark.parametrize(("config", "sentence"), IMPOSSIBLE)
def test_impossible_sizes_are_refused_by_all_in_one_sentence(
    config: object, sentence: str, directory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    readers = (flags, loading, auto_rate, lambda place: recommended(place, capsys))
    said = {refusal(read, directory) for read in readers}
    assert len(said) == 1
    assert sentence in said.pop()
