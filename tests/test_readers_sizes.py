"""Numbers of a config.json: of a type, within bounds, and those that the tensors beside it have."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megalora.hf.files import TensorFiles
from megalora.hf.safetensors_files import HFWeights
from megalora.model.presets import PRESETS
from megalora.recommend.cli import count_trained_tokens
from tests.support.fuzzing import command
from tests.support.honest import LLAMA, MOE, write_base, write_peft, write_stacked_peft
from tests.support.soon import soon

MALFORMED = pytest.mark.bad_input("a malformed file")
UNBOUNDED = pytest.mark.bad_input("work without bound")

# What no size is, of whatever field.
NO_SIZES = ["32.0", '"32"', "true", "0", "-1", "NaN", "Infinity", "1e400", "[2]", "{}", "9" * 300]
SIZES = [
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "vocab_size", "intermediate_size", "num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "decoder_sparse_step"),
]
OTHERS = [
    *(("mlp_only_layers", value) for value in ('"a"', "3", '["a"]', "[[0]]", "[null]", "[1.0]")),
    *(("max_position_embeddings", value) for value in NO_SIZES),
    *(("rope_theta", value) for value in ('"x"', "NaN", "-1", "true", "[]", "1e400")),
    *(("rms_norm_eps", value) for value in ('"x"', "NaN", "-1", "2", "true")),
    *(("tie_word_embeddings", value) for value in ('"no"', "1", "[]")),
    *(("norm_topk_prob", value) for value in ('"no"', "1")),
    *(("model_type", value) for value in ("[]", "{}", "1", "null", '"x\\u001b[31m"')),
    ("rope_scaling", "[1]"),
    ("rope_scaling", '{"rope_type": [1]}'),
    ("rope_scaling", '{"rope_type": "llama3", "factor": "8"}'),
    ("rope_scaling", '{"rope_type": "llama3", "low_freq_factor": []}'),
]


def write_text(directory: Path, config: dict[str, object], field: str, text: str) -> Path:
    """Write a config.json in which one field is this text."""
    directory.mkdir(exist_ok=True)
    whole = json.dumps({**config, field: "@"}).replace('"@"', text)
    (directory / "config.json").write_text(whole)
    return directory


def commands(base: Path, adapter: Path) -> list[list[object]]:
    """Return the commands that go by a base's config.json and need no Megatron before."""
    output = adapter.with_name(f"{adapter.name}-never")
    return [
        ["flags", "--hf-model", base],
        ["import", adapter, "--hf-model", base, "--output", output],
    ]


@MALFORMED
@pytest.mark.parametrize("value", NO_SIZES)
@pytest.mark.parametrize("field", SIZES)
def test_what_is_no_size_is_refused_by_field_and_value(
    tmp_path: Path, field: str, value: str
) -> None:
    base = write_text(tmp_path / "base", MOE, field, value)
    for words in commands(base, tmp_path):
        with soon(), pytest.raises(ValueError, match=rf"config\.json {field} is .*must be an int"):
            command(*words)


@MALFORMED
@pytest.mark.parametrize(("field", "value"), OTHERS)
def test_other_fields_of_a_wrong_type_are_refused_by_name(
    tmp_path: Path, field: str, value: str
) -> None:
    base = write_text(tmp_path / "base", MOE, field, value)
    with pytest.raises(ValueError, match=r"config\.json (rope_|low_|factor|\w+ is)"):
        command("flags", "--hf-model", base)


@UNBOUNDED
@pytest.mark.parametrize(
    ("field", "value"),
    [("num_hidden_layers", 10**9), ("num_hidden_layers", 10**18), ("num_experts", 10**9)]
    + [("vocab_size", 10**12), ("hidden_size", 10**9), ("moe_intermediate_size", 10**12)],
)
def test_a_config_alone_is_bounded(tmp_path: Path, field: str, value: int) -> None:
    base = write_text(tmp_path / "base", MOE, field, str(value))
    for words in (*commands(base, tmp_path), ["recommend", "--model", base, "--rank", 2]):
        said = rf"config\.json {field} is {value}: .* at most"
        with soon(), pytest.raises(ValueError, match=said):
            command(*words)


@UNBOUNDED
def test_the_largest_config_alone_is_counted_soon(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 4096, "num_experts": 65536, "vocab_size": 2**26}
    dense = list(range(4096)) * 100
    config = {**MOE, **sizes, "num_experts_per_tok": 1, "mlp_only_layers": dense}
    write_text(tmp_path / "base", config, "hidden_size", str(2**20))
    with soon():
        command("recommend", "--model", tmp_path / "base", "--rank", 2)


@UNBOUNDED
def test_megatron_flags_are_bounded_as_a_config_is() -> None:
    sizes = ["--hidden-size", 8, "--num-attention-heads", 1, "--vocab-size", 8, "--rank", 2]
    experts = ["--num-experts", 2, "--moe-layer-freq", 1]
    with soon(), pytest.raises(ValueError, match="num_layers is 1000000000: must be 4,096 at most"):
        command("recommend", "--num-layers", 10**9, *sizes, *experts)


@MALFORMED
@pytest.mark.parametrize("text", ["[" * 100_000, "x", '{"a": 1}', "[1.5]", "-1", "0", "null"])
def test_a_frequency_of_layers_that_is_none_is_a_usage_error(text: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        command("recommend", "--moe-layer-freq", text, "--rank", 2)


WRONG = [
    ("num_hidden_layers", 3, "num_hidden_layers 3 (its tensors 2)"),
    ("num_hidden_layers", 4000, "num_hidden_layers 4,000 (its tensors 2)"),
    ("vocab_size", 11, "vocab_size 11 (its tensors 10)"),
    ("vocab_size", 2**26, "(its tensors 10)"),
    ("hidden_size", 16, "hidden_size 16 (its tensors 8)"),
    ("num_experts", 8, "num_experts 8 (its tensors 4)"),
    ("num_experts", 65536, "num_experts 65,536 (its tensors 4)"),
    ("intermediate_size", 2**24, "intermediate_size 16,777,216 (its tensors 12)"),
    ("moe_intermediate_size", 2**24, "moe_intermediate_size 16,777,216 (its tensors 6)"),
    ("head_dim", 2**16, "num_attention_heads x head_dim 262,144 (its tensors 8)"),
    ("num_key_value_heads", 4, "num_key_value_heads x head_dim 8 (its tensors 4)"),
]


@MALFORMED
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("field", "value", "sentence"), WRONG)
def test_sizes_that_the_tensors_do_not_have_are_refused_before_anything_is_built(
    tmp_path: Path, field: str, value: int, sentence: str, shards: int
) -> None:
    base, adapter = write_base(tmp_path / "base", MOE, shards), write_peft(tmp_path / "adapter")
    write_text(base, MOE, field, str(value))
    merge = ["merge", adapter, "--hf-model", base, "--output", tmp_path / "never"]
    for words in (*commands(base, adapter), merge, ["recommend", "--model", base, "--rank", 2]):
        with soon(), pytest.raises(ValueError, match="not of one model") as caught:
            command(*words)
        assert sentence in str(caught.value)
    assert not (tmp_path / "never").exists()


@MALFORMED
def test_stacked_experts_are_counted_too(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({name: torch.ones(4, 2, 3)}, tmp_path / "model.safetensors")
    config = {**MOE, "num_hidden_layers": 1, "mlp_only_layers": []}
    write_text(tmp_path, config, "num_experts", "4")
    command("flags", "--hf-model", tmp_path)
    write_text(tmp_path, config, "num_experts", "5000")
    with pytest.raises(ValueError, match=r"num_experts 5,000 \(its tensors 4\)"):
        command("flags", "--hf-model", tmp_path)


def test_where_weights_are_not_there_nothing_is_compared(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", LLAMA, shards=2)
    whole = command("flags", "--hf-model", base)
    (base / "model-00001-of-00002.safetensors").unlink()
    assert command("flags", "--hf-model", base) == whole


@pytest.mark.parametrize("name", PRESETS)
def test_every_known_model_is_within_the_bounds(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PRESETS[name]))
    command("recommend", "--model", tmp_path, "--rank", 8)


@UNBOUNDED
@pytest.mark.parametrize("experts", [10**12, 2**40])
def test_a_tensor_of_no_bytes_and_very_many_experts_is_refused(
    tmp_path: Path, experts: int
) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    header = {name: {"dtype": "F32", "shape": [experts, 0, 5], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert name in TensorFiles(tmp_path)
    with soon(), pytest.raises(ValueError, match=f"{name} has shape"):
        HFWeights(tmp_path)


@MALFORMED
def test_stacked_experts_of_odd_rows_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    save_file({name: torch.ones(2, 3, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name} has shape"):
        HFWeights(tmp_path)


@MALFORMED
@pytest.mark.parametrize("module", ["lm_head", "model.layers.0.mlp.experts"])
@pytest.mark.parametrize("shapes", [((), (1,)), ((4,), (4, 2)), ((2, 8, 1), (10, 2))])
def test_factors_of_other_than_two_dimensions_are_refused(
    tmp_path: Path, module: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    adapter = write_peft(tmp_path / "adapter")
    factors = {
        f"base_model.model.{module}.lora_{x}.weight": torch.ones(shape)
        for x, shape in zip("AB", shapes, strict=True)
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    # Experts may have three, where the configuration names their parameter.
    refused = rf"no matrices: {module}\.lora_. \[|{module} adapts one expert parameter"
    with pytest.raises(ValueError, match=refused):
        command("inspect", adapter)


@UNBOUNDED
def test_experts_that_no_model_has_are_not_taken_apart(tmp_path: Path) -> None:
    adapter = write_stacked_peft(tmp_path / "adapter")
    path = adapter / "adapter_config.json"
    patterns = {r"mlp\.experts\..*": 1}
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 1, "rank_pattern": patterns}))
    file = adapter / "adapter_model.safetensors"
    a, b = torch.zeros(70_000, 8), torch.zeros(12, 70_000)
    down_a, down_b = torch.zeros(70_000, 6), torch.zeros(8, 70_000)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    save_file(
        {
            f"{prefix}.base_layer.lora_A.weight": a,
            f"{prefix}.base_layer.lora_B.weight": b,
            f"{prefix}.lora_A.weight": down_a,
            f"{prefix}.lora_B.weight": down_b,
        },
        file,
    )
    with soon(), pytest.raises(ValueError, match=r"has 70,000 experts of rank 1: 65,536 at most"):
        command("inspect", adapter)


@MALFORMED
@pytest.mark.parametrize("text", ["{", "[]", '{"tokenizer_class": 3}', "\x00"])
def test_a_broken_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=f"tokenizer {tmp_path} cannot be read"):
        count_trained_tokens(str(tmp_path / "data.jsonl"), str(tmp_path))


@MALFORMED
def test_a_tokenizer_that_is_a_device_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/dev/zero")
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    with soon(), pytest.raises(ValueError, match=r"tokenizer\.json is a device"):
        count_trained_tokens(str(tmp_path / "data.jsonl"), str(tmp_path))
