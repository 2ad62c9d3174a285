"""What is sent to vLLM and SGLang is what their own source declares and reads.

`make servers` fetches it; without it these tests skip.
"""

import ast
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megalora.hf.files import read_json
from megalora.rollouts import sglang as sglang_engine
from megalora.rollouts import vllm as vllm_engine
from megalora.rollouts.engine import Sampling
from megalora.sync.pickled import pickle_tensors
from tests.support import sglang_reader, vllm_classes
from tests.support.served_adapters import config_of, factors_of, written
from tests.support.server_stubs import SERVERS

VLLM, SGLANG = SERVERS / vllm_classes.FOLDER, SERVERS / sglang_reader.FOLDER
COMPLETION = VLLM / "vllm/entrypoints/openai/completion/protocol.py"
LORA = VLLM / "vllm/entrypoints/serve/lora/protocol.py"
IO_STRUCT = SGLANG / "sglang/srt/managers/io_struct.py"
SAMPLING = SGLANG / "sglang/srt/sampling/sampling_params.py"
COMMON = SGLANG / "sglang/srt/utils/common.py"

needs_servers = pytest.mark.skipif(
    not (COMPLETION.is_file() and COMMON.is_file()), reason="the servers' source: make servers"
)


def fields(path: Path, cls: str) -> set[str]:
    """Return the fields that a class of a server declares."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            own = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            return {target.id for target in own if isinstance(target, ast.Name)}
    raise LookupError(cls)


@needs_servers
def test_every_field_of_a_request_is_one_that_the_server_declares() -> None:
    sampling = Sampling(max_tokens=3, stop=(1,))
    sent = vllm_engine._request("a", [1], 2, sampling)
    assert sent.keys() <= fields(COMPLETION, "CompletionRequest")
    assert {"lora_name", "lora_path", "load_inplace"} <= fields(LORA, "LoadLoRAAdapterRequest")
    assert "lora_name" in fields(LORA, "UnloadLoRAAdapterRequest")
    sent = sglang_engine._request("a", [1], 2, sampling)
    assert sent.keys() <= fields(IO_STRUCT, "GenerateReqInput")
    assert sent["sampling_params"].keys() <= fields(SAMPLING, "SamplingParams")
    given = {"lora_name", "config_dict", "serialized_named_tensors"}
    assert given <= fields(IO_STRUCT, "LoadLoRAAdapterFromTensorsReqInput")
    assert {"lora_name", "lora_path"} <= fields(IO_STRUCT, "LoadLoRAAdapterReqInput")
    assert {"success", "error_message"} <= fields(IO_STRUCT, "LoRAUpdateOutput")


def safe_unpickler() -> type[pickle.Unpickler]:
    """Return SGLang's unpickler, of its own source."""
    wanted = ("_safe_load_torch_storage", "SafeUnpickler")
    source = COMMON.read_text()
    parts = [n for n in ast.parse(source).body if getattr(n, "name", "") in wanted]
    assert len(parts) == len(wanted)
    found: dict[str, Any] = {"io": io, "pickle": pickle, "torch": torch}
    exec(compile(ast.Module(parts, []), COMMON, "exec"), found)
    return found["SafeUnpickler"]


@pytest.fixture(scope="module")
def sglang() -> Iterator[sglang_reader.Reader]:
    with sglang_reader.sglang() as reader:
        yield reader


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@needs_servers
def test_sglang_unpickles_and_loads_what_is_sent(
    family: str, dtype: torch.dtype, sglang: sglang_reader.Reader, tmp_path: Path
) -> None:
    config = config_of(family)
    directory = written(tmp_path, factors_of(family, (4, 4), head=True), "uniform", family)
    stored = load_file(directory / "adapter_model.safetensors")
    given = {name: tensor.to(dtype) for name, tensor in stored.items()}
    data = b"".join(pickle_tensors(given.items(), piece_bytes=1000))
    assert data[0] == 0x80
    assert data[1] <= pickle.HIGHEST_PROTOCOL
    found = safe_unpickler()(io.BytesIO(data)).load()
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    manager = sglang.load(directory, config)
    sglang.modules["sglang.srt.lora.lora_manager"].LoRARef = SimpleNamespace
    ref = SimpleNamespace(lora_id="b", lora_name="b", lora_path="__tensor__", pinned=False)
    settings = read_json(directory / "adapter_config.json")
    result = manager.load_lora_adapter_from_tensors(ref, found, settings)
    assert result.success, result.error_message
    by_path, by_tensors = (
        {n: t for layer in manager.loras[one].layers for n, t in layer.weights.items()}
        for one in ("adapter", "b")
    )
    assert by_path.keys() == by_tensors.keys() != set()
    assert all(torch.equal(by_tensors[name], t.to(dtype)) for name, t in by_path.items())


@needs_servers
@pytest.mark.bad_input("code in a file")
def test_sglangs_unpickler_refuses_what_is_not_on_its_list() -> None:
    # So that the test above can fail: Megatron's function in the place of torch's is refused.
    data = pickle.dumps({"a": print})
    with pytest.raises(RuntimeError, match="Blocked unsafe global"):
        safe_unpickler()(io.BytesIO(data)).load()
