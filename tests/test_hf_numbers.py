"""The commands refuse numbers that are none in one sentence, and leave nothing behind."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalora.__main__ import main
from megalora.hf.cuts import Placement, Shard
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import write_adapter
from megalora.hf.weights import Weights
from tests.support.forked import call

NUMBERS = pytest.mark.bad_input("a number that is not one")
NAN = float("nan")
CONFIG = {
    **{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu"},
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32},
    **{"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64},
    **{"tie_word_embeddings": False, "attention_bias": False},
}
UP = "model.layers.0.mlp.up_proj"
NAMES = (UP, "model.layers.0.mlp.gate_proj")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory with a base and an adapter of it."""
    weights = Weights(CONFIG, Placement(Shard(), Shard(), Shard()))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(CONFIG))
    tensors = {name: torch.ones(shape) for name, shape in weights.expected().items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    one = LoRAFactors(torch.ones(2, 16), torch.ones(24, 2), 1.0)
    write_adapter(tmp_path / "peft", dict.fromkeys(NAMES, one), base_model_name="tiny")
    return tmp_path


def run(*words: object) -> tuple[int, str]:
    """Return the status of a command and what it says of errors."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = main([str(word) for word in words])
    return status, error.getvalue()


def change(file: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(file)
    save_file({**tensors, name: how(tensors[name])}, file, metadata={"format": "pt"})


def fill(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def spoil_base(place: Path) -> None:
    change(place / "base" / "model.safetensors", f"{UP}.weight", fill(NAN))


def spoil_adapter(place: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for end in "AB":
        file = place / "peft" / "adapter_model.safetensors"
        change(file, f"base_model.model.{UP}.lora_{end}.weight", how)


def import_base(place: Path) -> tuple[int, str]:
    spoil_base(place)
    return run("import-base", "--hf-model", place / "base", "--output", place / "out")


def merge_base(place: Path) -> tuple[int, str]:
    spoil_base(place)
    return run("merge", place / "peft", "--hf-model", place / "base", "--output", place / "out")


def import_adapter(place: Path) -> tuple[int, str]:
    return run("import", place / "peft", "--hf-model", place / "base", "--output", place / "out")


def import_codes(place: Path) -> tuple[int, str]:
    spoil_adapter(place, lambda tensor: tensor.to(torch.float8_e4m3fn))
    return import_adapter(place)


def import_integers(place: Path) -> tuple[int, str]:
    spoil_adapter(place, lambda tensor: tensor.to(torch.int32))
    return import_adapter(place)


def import_huge(place: Path) -> tuple[int, str]:
    spoil_adapter(place, fill(1e30))
    return import_adapter(place)


def import_alpha(place: Path) -> tuple[int, str]:
    file = place / "peft" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 10**299}))
    return import_adapter(place)


def import_rank(place: Path) -> tuple[int, str]:
    words = ["--hf-model", place / "base", "--output", place / "out", "--rank", 10**9]
    return run("import", place / "peft", *words)


def export_diverged(place: Path) -> tuple[int, str]:
    """Export a checkpoint whose adapters are not finite, as nothing here writes them any more."""
    assert import_adapter(place)[0] == 0
    (place / "out").rename(place / "checkpoint")
    from megalora.hf import one_process
    from megalora.model.config_json import model_shape

    tensors, config, _ = one_process.read_adapter(place / "checkpoint")
    tensors["decoder.layers.0.mlp.linear_fc1_lora.lora_B"][0, 0] = NAN
    one_process.write_adapter_checkpoint(
        place / "diverged", tensors, config, model_shape(CONFIG), overwrite=True
    )
    words = ["--hf-model", place / "base", "--output", place / "out"]
    return run("export", place / "diverged", *words)


CASES: dict[Callable[[Path], tuple[int, str]], str] = {
    import_base: f"model.safetensors: {UP}.weight as torch.bfloat16",
    merge_base: f"model.safetensors: {UP}.weight has NaN or infinite values",
    import_codes: f"{UP}.lora_A (torch.float8_e4m3fn): save it as float32, bfloat16 or float16",
    import_integers: f"{UP}.lora_A (torch.int32): save it as float32, bfloat16 or float16",
    import_huge: f"updates scale * B @ A beyond float32 in {UP}: ",
    import_alpha: "adapter_config lora_alpha is 1000",
    import_rank: "lora_rank is 1000000000: it must be an integer >= 1 and <= 65536",
    export_diverged: "NaN or infinite values in model.layers.0.mlp.gate_proj: use a checkpoint",
}


@NUMBERS
@pytest.mark.parametrize("command", CASES, ids=lambda command: command.__name__)
def test_a_command_says_which_number_and_leaves_nothing(
    command: Callable[[Path], tuple[int, str]], place: Path
) -> None:
    status, error = call(command, place)
    assert status == 2
    last = error.splitlines()[-1]
    assert last.startswith("error: ")
    assert CASES[command] in last
    assert not (place / "out").exists()
    assert not list(place.glob(".*")), "nothing half written stays"
