"""SGLang's own loading of an adapter, run on the CPU on a model of stub layers.

Its own code from its wheel: LoRAConfig, LoRAAdapter (which names and stacks), LoRAManager.__init__
with all that it calls (targets, ranks, shared-outer experts, which modules it wraps) and
LoRAMemoryPool (buffers, and the copy of an adapter into them). Stubs: layers, their wrappers, which
here slice nothing, backends, distributed state, the loader of safetensors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.served_adapters import OF_DELTA, experts_of, is_delta_net, shared_of
from tests.support.server_stubs import Quiet, Stub, imported

FOLDER = "sglang-0.5.23"
_REAL = {
    *("sglang.srt.lora.lora_config", "sglang.srt.lora.lora", "sglang.srt.lora.utils"),
    *("sglang.srt.lora.lora_manager", "sglang.srt.lora.mem_pool"),
    *("sglang.srt.lora.eviction_policy", "sglang.srt.layers.utils.common"),
}


class Wrapper(Stub):
    """A wrapper of a stub layer on one rank, where nothing is sliced."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def slice_lora_a_weights(self, weights: Tensor) -> Tensor:
        """Return all."""
        return weights

    slice_lora_b_weights = slice_lora_a_weights

    def slice_moe_lora_a_weights(self, weights: Any, *_: object) -> Any:
        """Return all."""
        return weights

    slice_moe_lora_b_weights = slice_moe_lora_a_weights

    def set_lora_info(self, *_: object, **__: object) -> None:
        """Take the buffers."""


class _Loader:
    Source = staticmethod(lambda path, **_: path)

    def __init__(self, _: object) -> None: ...

    def _get_weights_iterator(self, path: str) -> Iterator[tuple[str, Tensor]]:
        yield from load_file(Path(path) / "adapter_model.safetensors").items()


class _Off:
    """Environment variables and enumerations: all off."""

    def __getattr__(self, name: str) -> Any:
        return (lambda: False) if name == "get" or name.startswith("is_") else _Off()


def _given() -> dict[str, dict[str, Any]]:
    class FusedMoE(Stub):
        is_shared_fused_moe, moe_tp_rank = False, 0
        moe_runner_config = SimpleNamespace(is_gated=True)

    class LinearBase(Stub): ...

    class VocabParallelEmbedding(Stub): ...

    class ParallelLMHead(VocabParallelEmbedding): ...

    class FusedMoEWithLoRA(Wrapper): ...

    def wrap(layer: nn.Module, *_: object, **__: object) -> Wrapper:
        return (FusedMoEWithLoRA if isinstance(layer, FusedMoE) else Wrapper)(layer)

    def replace(model: nn.Module, name: str, layer: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)

    one = {"attn_tp_size": 1, "tp_size": 1, "tp_rank": 0, "attn_cp_size": 1, "moe_ep_size": 1}
    parallel = SimpleNamespace(
        **one,
        moe_ep_rank=0,
        moe_tp_size=1,
        moe_tp_rank=0,
        attn_dp_enabled=False,
        dcp_replicate_q_proj=False,
        pp_group=SimpleNamespace(is_last_rank=True),
    )
    lora = SimpleNamespace(
        enable_lora_overlap_loading=False,
        lora_eviction_policy="lru",
        experts_shared_outer_loras=None,
        lora_use_virtual_experts=False,
        lora_strict_loading=False,
    )
    layers = "sglang.srt.layers."
    return {
        f"{layers}moe.fused_moe_triton.layer": {"FusedMoE": FusedMoE},
        f"{layers}moe.utils": {"get_moe_runner_backend": _Off},
        f"{layers}linear": {"LinearBase": LinearBase},
        f"{layers}vocab_parallel_embedding": {
            "ParallelLMHead": ParallelLMHead,
            "VocabParallelEmbedding": VocabParallelEmbedding,
        },
        "sglang.srt.environ": {"envs": _Off()},
        "sglang.srt.lora.layers": {
            "BaseLayerWithLoRA": Wrapper,
            "FusedMoEWithLoRA": FusedMoEWithLoRA,
            "get_lora_layer": wrap,
            "unwrap_lora_layer": lambda layer: getattr(layer, "base_layer", layer),
        },
        "sglang.srt.lora.backend.lora_registry": {
            "get_backend_from_name": lambda _: lambda **__: Quiet()
        },
        "sglang.srt.lora.lora_registry": {"LoRARef": SimpleNamespace},
        "sglang.srt.managers.io_struct": {"LoRAUpdateOutput": SimpleNamespace},
        "sglang.srt.model_loader.loader": {"DefaultModelLoader": _Loader},
        "sglang.srt.runtime_context": {
            "get_parallel": lambda: parallel,
            "get_lora": lambda: lora,
            "get_spec": lambda: SimpleNamespace(speculative_algorithm=None),
        },
        "sglang.srt.utils": {
            "is_pin_memory_available": lambda: False,
            "replace_submodule": replace,
        },
    }


@contextmanager
def sglang() -> Iterator["Reader"]:
    """Yield SGLang's reader of adapters."""
    given = _given()
    with imported(FOLDER, _REAL, given) as modules:
        common = modules["sglang.srt.layers.utils.common"]
        for name in ("lora", "lora_manager", "mem_pool"):
            modules[f"sglang.srt.lora.{name}"].get_layer_id = common.get_layer_id
        yield Reader(modules, given)


class Reader:
    """Loads adapters into models of stub layers."""

    def __init__(self, modules: dict[str, Any], stubs: dict[str, dict[str, Any]]) -> None:
        self.modules, self.stubs = modules, stubs

    def refusal(self, directory: Path, config: Any) -> str:
        """Return why an adapter of --lora-paths cannot be served; empty where it can."""
        try:
            self.load(directory, config)
        except (ValueError, AssertionError, RuntimeError, KeyError, NotImplementedError) as error:
            return str(error) or repr(error)
        return ""

    def load(self, directory: Path, config: Any) -> Any:
        """Return SGLang's manager with an adapter in its buffers, in slot 1."""
        ref = SimpleNamespace(
            lora_id="adapter", lora_name="adapter", lora_path=str(directory), pinned=False
        )
        manager = self.modules["sglang.srt.lora.lora_manager"].LoRAManager(
            base_model=self._model(config),
            base_hf_config=config,
            max_loras_per_batch=2,
            load_config=None,
            dtype=torch.float32,
            server_args=None,
            lora_paths=[ref],
        )
        manager.fetch_new_loras({None, "adapter"})
        return manager

    def _model(self, config: Any) -> nn.Module:
        layers = "sglang.srt.layers."
        linear = self.stubs[layers + "linear"]["LinearBase"]
        vocabulary = self.stubs[layers + "vocab_parallel_embedding"]
        model = nn.Module()
        model.config = config
        model.register_parameter("any", nn.Parameter(torch.zeros(1)))
        found: dict[str, nn.Module] = {
            "model.embed_tokens": vocabulary["VocabParallelEmbedding"](),
            "lm_head": vocabulary["ParallelLMHead"](),
        }
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            if is_delta_net(config.model_type, layer):
                found |= {f"{prefix}.linear_attn.{leaf}": linear() for leaf in OF_DELTA}
            else:
                leaves = ("qkv_proj", "o_proj")
                found |= {f"{prefix}.self_attn.{leaf}": linear() for leaf in leaves}
            if experts_of(config, layer):
                place = "block_sparse_moe" if config.model_type == "mixtral" else "mlp"
                found[f"{prefix}.{place}.gate"] = linear()
                moe = self.stubs[layers + "moe.fused_moe_triton.layer"]
                found[f"{prefix}.{place}.experts"] = moe["FusedMoE"]()
                for leaf in ("gate_up_proj", "down_proj") if shared_of(config) else ():
                    found[f"{prefix}.mlp.{shared_of(config)}.{leaf}"] = linear()
            else:
                found |= {
                    f"{prefix}.mlp.{leaf}": linear() for leaf in ("gate_up_proj", "down_proj")
                }
        for name, stub in found.items():
            parent, _, leaf = name.rpartition(".")
            place = model
            for part in parent.split(".") if parent else ():
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Module())
                place = place.get_submodule(part)
            place.add_module(leaf, stub)
        return model
