"""Adapters that cannot be represented, and broken files: refused by name, nothing left behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megalora.hf.directories import whole_directory
from megalora.hf.factors import LoRAFactors, check_factors
from megalora.hf.peft import read_adapter, write_adapter

NAME = "model.layers.0.self_attn.q_proj"
NUMBERS = pytest.mark.bad_input("a number that is not one")
# Of as many digits as a JSON file may have in a number.
HUGE = 10**299
INF, NAN = float("inf"), float("nan")


def one(fill: float = 1.0) -> dict[str, LoRAFactors]:
    return {NAME: LoRAFactors(torch.ones(2, 8), torch.full((6, 2), fill), 1.0)}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    write_adapter(tmp_path / "a", one(), base_model_name="tiny")
    return tmp_path / "a"


def change_config(directory: Path, **fields: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(directory: Path, **tensors: torch.Tensor) -> None:
    prefix = f"base_model.model.{NAME}"
    whole = {
        f"{prefix}.lora_A.weight": torch.ones(2, 8),
        f"{prefix}.lora_B.weight": torch.ones(6, 2),
    }
    save_file({**whole, **tensors}, directory / "adapter_model.safetensors")


def test_the_adapter_of_these_tests_is_readable(adapter):
    assert list(read_adapter(adapter)) == [NAME]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("use_bdlora", {"nblocks": 2}),
        ("trainable_token_indices", [1]),
        ("layer_replication", [[0, 1]]),
        ("use_something_new", True),
        ("new_config", {"a": 1}),
        ("init_lora_weights", "pissa_niter_4"),
    ],
)
def test_what_plain_factors_cannot_represent_is_refused_by_name(adapter, field, value):
    change_config(adapter, **{field: value})
    with pytest.raises(ValueError, match=field):
        read_adapter(adapter)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("rank_pattern", {"(q_proj": 2}),
        ("alpha_pattern", [1]),
    ],
)
def test_a_broken_configuration_is_refused_by_field(adapter, field, value):
    change_config(adapter, **{field: value})
    with pytest.raises(ValueError, match=f"adapter_config {field} "):
        read_adapter(adapter)


def test_an_unknown_harmless_field_is_named(adapter):
    change_config(adapter, colour="blue")
    with pytest.warns(UserWarning, match="colour"):
        read_adapter(adapter)


def test_a_configuration_of_other_tensors_is_refused(adapter):
    change_config(adapter, r=3)
    with pytest.raises(ValueError, match=f"{NAME} the rank 3"):
        read_adapter(adapter)


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{NAME}.lora_magnitude_vector",
        f"base_model.model.{NAME}.lora_B.bias",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        f"{NAME}.lora_A.weight",
    ],
)
def test_unknown_tensors_are_refused_by_name(adapter, key):
    change_tensors(adapter, **{key: torch.ones(2, 2)})
    with pytest.raises(ValueError, match=key):
        read_adapter(adapter)


def test_half_a_pair_is_refused(adapter):
    change_tensors(adapter, **{"base_model.model.lm_head.lora_A.weight": torch.ones(2, 8)})
    with pytest.raises(ValueError, match="one of lora_A and lora_B of lm_head"):
        read_adapter(adapter)


@pytest.mark.parametrize("b", [torch.ones(6, 3)])
def test_wrong_shapes_are_refused(adapter, b):
    change_tensors(adapter, **{f"base_model.model.{NAME}.lora_B.weight": b})
    with pytest.raises(ValueError, match="expected"):
        read_adapter(adapter)


RANKS = [0, -1, 65537, HUGE, 0.5, NAN, INF, True, "2", None]
ALPHAS = [0, -2, 1e39, 1e-31, HUGE, NAN, INF, -INF, True, "many", None]


@NUMBERS
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", value) for value in RANKS),
        *(("rank_pattern", {"q_proj": value}) for value in RANKS),
        *(("lora_alpha", value) for value in ALPHAS),
        *(("alpha_pattern", {"q_proj": value}) for value in ALPHAS),
        *(("use_rslora", value) for value in ("false", 1, 0.0)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_number_is_refused_by_field(adapter, field, value):
    change_config(adapter, **{field: value})
    with pytest.raises(ValueError, match=f"adapter_config {field} .*: must be "):
        read_adapter(adapter)


def test_a_rank_that_is_written_as_a_float_is_read(adapter):
    change_config(adapter, r=2.0)
    assert read_adapter(adapter)[NAME].rank == 2


PRECISIONS = [
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.int64),
    *(torch.bool, torch.complex64),
]


@NUMBERS
@pytest.mark.parametrize("module", [NAME, "model.layers.0.mlp.experts"], ids=["dense", "3-D"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_codes_of_numbers_are_no_factors(adapter, dtype, module):
    prefix = f"base_model.model.{module}"
    tensors = {f"{prefix}.lora_{end}.weight": torch.ones(2, 2).to(dtype) for end in "AB"}
    change_tensors(adapter, **tensors)
    with pytest.raises(ValueError, match=rf"{module}\.lora_A \({dtype}\): save it as float32"):
        read_adapter(adapter)


@NUMBERS
@pytest.mark.parametrize("shape", [(), (2,), (1, 2, 2)], ids=str)
def test_factors_are_matrices(adapter, shape):
    change_tensors(adapter, **{f"base_model.model.{NAME}.lora_A.weight": torch.ones(shape)})
    with pytest.raises(ValueError, match=rf"{NAME}\.lora_A \[.*\]: expected 2-D"):
        read_adapter(adapter)


@NUMBERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("end", ["A", "B"])
def test_what_is_not_finite_is_refused_on_reading(adapter, end, value, dtype):
    factor = torch.ones((2, 8) if end == "A" else (6, 2), dtype=dtype)
    factor[1, 1] = value
    change_tensors(adapter, **{f"base_model.model.{NAME}.lora_{end}.weight": factor})
    with pytest.raises(ValueError, match=f"NaN .* {NAME}"):
        read_adapter(adapter)


@NUMBERS
@pytest.mark.parametrize(
    ("a", "b", "scale", "dtype"),
    [
        (1e30, 1e30, 1.0, torch.float32),
        (1e30, 1e30, 1e-30, torch.float32),
        (1e30, 1e30, 1.0, torch.bfloat16),
        (1e19, 1e19, 4.0, torch.float32),
        (1e200, 1e200, 1.0, torch.float64),
    ],
)
def test_an_update_beyond_float32_is_refused(a, b, scale, dtype):
    factors = LoRAFactors(
        torch.full((2, 8), a, dtype=dtype), torch.full((6, 2), b, dtype=dtype), scale
    )
    with pytest.raises(ValueError, match=f"beyond float32 in {NAME}: "):
        check_factors({NAME: factors})


def test_an_update_above_the_bound_is_taken_where_it_is_finite():
    # Rows and columns that do not meet.
    a, b = torch.zeros(2, 8), torch.zeros(6, 2)
    a[0], b[:, 1] = 1e30, 1e30
    check_factors({NAME: LoRAFactors(a, b, 1.0)})


@NUMBERS
def test_a_scale_that_is_not_finite_is_refused():
    for scale in (NAN, INF, -INF):
        with pytest.raises(ValueError, match=f"NaN .* {NAME}"):
            check_factors({NAME: LoRAFactors(torch.ones(2, 8), torch.ones(6, 2), scale)})


@NUMBERS
def test_a_scale_that_leaves_fp32_when_it_is_folded_in_is_not_written(tmp_path):
    factors = {NAME: LoRAFactors(torch.full((1, 8), 1e-30), torch.full((6, 1), 1e20), 1e25)}
    write_adapter(tmp_path / "peft", factors, base_model_name="tiny")
    with pytest.raises(ValueError, match="NaN or infinite"):
        write_adapter(tmp_path / "new", factors, base_model_name="tiny", format="uniform")
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_truncated_safetensors_are_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_adapter(adapter)


@pytest.mark.bad_input("code in a file")
def test_a_pickle_is_never_opened(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="pickle"):
        read_adapter(adapter)


@pytest.mark.parametrize("file_name", ["../a/adapter_model.safetensors", "/etc/passwd", "x.bin", 3])
def test_an_index_cannot_lead_out_of_its_directory(adapter, file_name):
    (adapter / "adapter_model.safetensors").unlink()
    index = adapter / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": file_name}}))
    with pytest.raises(ValueError, match=r"only \.safetensors files of its own directory"):
        read_adapter(adapter)


def test_a_missing_shard_is_named(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    index = adapter / "adapter_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "adapter_model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors is missing"):
        read_adapter(adapter)


@pytest.mark.parametrize("text", ["{", "[]", None])
def test_a_broken_json_file_is_named(adapter, text):
    path = adapter / "adapter_config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter(adapter)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.parent.rglob("*") if p.is_file()}


@NUMBERS
def test_a_refused_write_leaves_the_target_untouched(adapter):
    before = contents(adapter)
    with pytest.raises(ValueError, match="NaN"):
        write_adapter(adapter, one(float("nan")), base_model_name="x", overwrite=True)
    with pytest.raises(ValueError, match="not empty"):
        write_adapter(adapter, one(2.0), base_model_name="x")
    assert contents(adapter) == before
    write_adapter(adapter, one(2.0), base_model_name="x", overwrite=True)
    assert contents(adapter) != before


@pytest.mark.bad_input("a write that fails")
def test_a_failure_halfway_leaves_neither_target_nor_rest(tmp_path):
    def fail() -> None:
        with whole_directory(tmp_path / "new") as directory:
            (directory / "half").write_text("half")
            raise OSError("disk full")

    with pytest.raises(ValueError, match="cannot be written: disk full: nothing was written"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_experts_of_different_scales_need_the_uniform_format(tmp_path):
    factors = {
        f"model.layers.0.mlp.experts.{e}.{p}": LoRAFactors(
            torch.ones(1 + e, 4), torch.ones(4, 1 + e), 1 + e
        )
        for e in range(2)
        for p in ("gate_proj", "up_proj", "down_proj")
    }
    with pytest.raises(ValueError, match="uniform"):
        write_adapter(tmp_path / "a", factors, base_model_name="x")
    write_adapter(tmp_path / "a", factors, base_model_name="x", format="uniform")


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="peft, uniform, peft-3d"):
        write_adapter(tmp_path / "a", one(), base_model_name="x", format="gguf")  # type: ignore[arg-type]
