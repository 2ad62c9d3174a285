"""vLLM's own loading of an adapter, run on the CPU on a model of stub layers.

Its own code from its wheel: PEFTHelper, LoRAModel, LoRALayerWeights, PackedLoRALayerWeights, all of
`vllm.lora.utils`, LoRAModelManager (which modules it wraps, how it packs), LogitsProcessorWithLoRA
and WorkerLoRAManager._load_adapter; and what a model's class declares, by the source of its file.
Stubs: linears, experts, their wrappers (which only hold ranks against the largest one), kernels.
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.support.served_adapters import OF_DELTA, experts_of, is_delta_net, shared_of
from tests.support.server_stubs import Quiet, Stub, imported
from tests.support.vllm_classes import FOLDER, declared

_REAL = {
    *("vllm.lora.peft_helper", "vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.utils"),
    *("vllm.lora.model_manager", "vllm.lora.worker_manager", "vllm.lora.layers.logits_processor"),
    *("vllm.model_executor.utils", "vllm.model_executor.models.utils"),
}


class BaseLayer(Stub):
    """What every wrapper derives from."""

    def set_mapping(self, _: object) -> None:
        """Take the kernels."""


class Wrapper(BaseLayer):
    """A wrapper of a stub layer, which takes factors up to the largest rank."""

    use_ep, ep_rank = False, 0

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = layer

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any) -> None:
        self.max_rank = lora_config.max_lora_rank

    def set_lora(self, _: int, lora_a: Any, lora_b: Any) -> None:
        """Hold factors, one or a list, single or of all experts, against the largest rank."""
        several = isinstance(lora_a, list)
        for a, b in zip(lora_a, lora_b, strict=True) if several else [(lora_a, lora_b)]:
            assert a is None or a.shape[-2] == b.shape[-1] <= self.max_rank


class Experts(Wrapper):
    @property
    def global_num_experts(self) -> int:
        return self.base_layer.num_experts

    local_num_experts = global_num_experts

    @property
    def w13_lora_a_stacked(self) -> list[torch.Tensor]:
        return [torch.empty(1, self.base_layer.num_experts)]


def _given() -> dict[str, dict[str, Any]]:
    class LinearBase(Stub): ...

    class MoERunner(Stub): ...

    class VocabParallelEmbedding(Stub): ...

    class FusedMoEWithLoRA(Experts):
        @classmethod
        def can_replace_layer(cls, source_layer: Any, packed_modules_list: Any, **_: Any) -> bool:
            return isinstance(source_layer, MoERunner) and len(packed_modules_list) == 2

    class FusedMoE3DWithLoRA(FusedMoEWithLoRA):
        @classmethod
        def can_replace_layer(cls, source_layer: Any, packed_modules_list: Any, **_: Any) -> bool:
            return isinstance(source_layer, MoERunner) and len(packed_modules_list) == 1

    class ReplicatedLinearWithLoRA(Wrapper):
        @classmethod
        def can_replace_layer(cls, source_layer: Any, **_: Any) -> bool:
            return isinstance(source_layer, LinearBase)

    class VocabParallelEmbeddingWithLoRA(Wrapper):
        @classmethod
        def can_replace_layer(cls, source_layer: Any, **_: Any) -> bool:
            return isinstance(source_layer, VocabParallelEmbedding)

    # Those that replace nothing here.
    linears = "ColumnParallel MergedColumnParallel QKVParallel MergedQKVParallel RowParallel"
    names = [f"{name}LinearWithLoRA" for name in shlex.split(linears)]
    names += [name.replace("WithLoRA", "WithShardedLoRA") for name in names]
    names += ["MergedColumnParallelLinearVariableSliceWithLoRA", "LogitsProcessorWithLoRA"]
    names += ["Step5FusedQKVIndexerWithLoRA", "Step5SparseIndexerWWithLoRA"]
    never = {"can_replace_layer": classmethod(lambda cls, **_: False)}
    wrappers = {name: type(name, (Wrapper,), never) for name in names}
    return {
        "vllm.logger": {"init_logger": lambda _: Quiet()},
        "vllm.utils.torch_utils": {"PIN_MEMORY": False},
        "vllm.utils.cache": {"LRUCache": _Cache},
        "vllm.distributed": {
            "get_tensor_model_parallel_world_size": lambda: 1,
            "get_tensor_model_parallel_rank": lambda: 0,
        },
        "vllm.model_executor.custom_op": {"maybe_get_oot_by_class": lambda cls: cls},
        "vllm.model_executor.layers.linear": {"LinearBase": LinearBase},
        "vllm.model_executor.layers.fused_moe": {"MoERunner": MoERunner},
        "vllm.model_executor.layers.vocab_parallel_embedding": {
            "VocabParallelEmbedding": VocabParallelEmbedding
        },
        "vllm.model_executor.models": {
            "SupportsLoRA": type("SupportsLoRA", (), {}),
            "is_pooling_model": lambda _: False,
            "supports_multimodal": lambda _: False,
        },
        "vllm.lora.layers": {
            **wrappers,
            "BaseLayerWithLoRA": BaseLayer,
            "FusedMoEWithLoRA": FusedMoEWithLoRA,
            "FusedMoE3DWithLoRA": FusedMoE3DWithLoRA,
            "ReplicatedLinearWithLoRA": ReplicatedLinearWithLoRA,
            "VocabParallelEmbeddingWithLoRA": VocabParallelEmbeddingWithLoRA,
        },
        "vllm.lora.layers.base": {"BaseLayerWithLoRA": BaseLayer},
        "vllm.lora.punica_wrapper": {"get_punica_wrapper": lambda *_, **__: object()},
    }


class _Cache(dict[int, Any]):
    def __init__(self, capacity: int) -> None:
        super().__init__()

    def __class_getitem__(cls, _: object) -> type:
        return cls


@contextmanager
def vllm() -> Iterator["Reader"]:
    """Yield vLLM's reader of adapters."""
    given = _given()
    with imported(FOLDER, _REAL, given) as modules:
        real = modules["vllm.lora.layers.logits_processor"].LogitsProcessorWithLoRA
        modules["vllm.lora.utils"].LogitsProcessorWithLoRA = real
        yield Reader(modules, given)


class Reader:
    """Loads adapters into models of stub layers."""

    def __init__(self, modules: dict[str, Any], stubs: dict[str, dict[str, Any]]) -> None:
        self.modules, self.stubs = modules, stubs

    def refusal(self, directory: Path, config: Any, **flags: Any) -> str:
        """Return why an adapter cannot be served on a base; empty where it can.

        config: of transformers. flags: fields of vLLM's LoRAConfig, and is_3d_lora_weight of the
        request.
        """
        is_3d = flags.pop("is_3d_lora_weight", False)
        lora = SimpleNamespace(
            **{
                "max_lora_rank": 16,
                "max_loras": 1,
                "max_cpu_loras": 1,
                "target_modules": None,
                "lora_dtype": torch.float32,
                "fully_sharded_loras": False,
                "enable_mixed_moe_lora_format": False,
                "enable_moe_shared_loras": False,
                "enable_tower_connector_lora": False,
                **flags,
            }
        )
        request = SimpleNamespace(
            lora_path=str(directory),
            lora_int_id=1,
            adapter_id=1,
            lora_name="adapter",
            is_3d_lora_weight=is_3d,
        )
        try:
            self._load(self._model(config), config, lora, request)
        except (ValueError, AssertionError, RuntimeError, KeyError) as error:
            return str(error) or repr(error)
        return ""

    def _load(self, model: nn.Module, config: Any, lora: Any, request: Any) -> None:
        manager = self.modules["vllm.lora.model_manager"].LoRAModelManager(
            model,
            1,
            8,
            config.vocab_size,
            lora,
            torch.device("cpu"),
            SimpleNamespace(parallel_config=SimpleNamespace(enable_expert_parallel=False)),
        )
        worker = object.__new__(self.modules["vllm.lora.worker_manager"].WorkerLoRAManager)
        worker._lora_model_cls = self.modules["vllm.lora.lora_model"].LoRAModel
        worker.lora_config, worker._adapter_manager = lora, manager
        worker.vocab_size, worker.max_position_embeddings = config.vocab_size, 64
        loaded = worker._load_adapter(request)
        manager._create_merged_loras_inplace(loaded)
        # Of other modules a stub model has not always the names that vLLM's class has.
        fused = {part for of in model.packed_modules_mapping.values() for part in of}
        left_out = [
            name
            for name in loaded.loras
            if "experts" in name or ("linear_attn" in name and name.rpartition(".")[2] not in fused)
            if name not in manager.modules
        ]
        assert not left_out, f"vLLM serves without {left_out}"
        for name, module in manager.modules.items():
            weights = manager._get_lora_layer_weights(loaded, name)
            if weights is not None:
                module.set_lora(0, weights.lora_a, weights.lora_b)

    def _model(self, config: Any) -> nn.Module:
        architecture = config.architectures[0]
        model = nn.Module()
        mapper = self.modules["vllm.model_executor.models.utils"].WeightsMapper
        for name, value in declared(architecture, mapper).items():
            setattr(model, name, value)
        model.config = config
        for name, stub in self._layers(config).items():
            parent, _, leaf = name.rpartition(".")
            place = model
            for part in parent.split(".") if parent else ():
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.add_module(leaf, stub)
        return model

    def _layers(self, config: Any) -> dict[str, nn.Module]:
        layers = "vllm.model_executor.layers."
        linear = self.stubs[layers + "linear"]["LinearBase"]
        vocabulary = self.stubs[layers + "vocab_parallel_embedding"]["VocabParallelEmbedding"]
        # vLLM's class of a multimodal model has the language model in it.
        whole = "language_model." if config.model_type in ("qwen3_5", "qwen3_5_moe") else ""
        found: dict[str, nn.Module] = {f"{whole}model.embed_tokens": vocabulary()}
        attention = "attn" if config.model_type == "gpt_oss" else "self_attn"
        for layer in range(config.num_hidden_layers):
            prefix = f"{whole}model.layers.{layer}"
            if is_delta_net(config.model_type, layer):
                found |= {f"{prefix}.linear_attn.{leaf}": linear() for leaf in OF_DELTA}
            else:
                leaves = ("qkv_proj", "o_proj")
                found |= {f"{prefix}.{attention}.{leaf}": linear() for leaf in leaves}
            if num_experts := experts_of(config, layer):
                experts = self.stubs[layers + "fused_moe"]["MoERunner"]()
                experts.num_experts = num_experts
                names = expert_names(config.model_type)
                experts.get_expert_mapping = lambda n=experts.num_experts, of=names: [
                    ("", f"experts.{e}.{name}.", e, "") for e in range(n) for name in of
                ]
                place = "block_sparse_moe" if config.model_type == "mixtral" else "mlp"
                found |= {f"{prefix}.{place}.gate": linear(), f"{prefix}.{place}.experts": experts}
                for leaf in ("gate_up_proj", "down_proj") if shared_of(config) else ():
                    found[f"{prefix}.mlp.{shared_of(config)}.{leaf}"] = linear()
            else:
                found |= {
                    f"{prefix}.mlp.{leaf}": linear() for leaf in ("gate_up_proj", "down_proj")
                }
        head, processor = vocabulary(), Stub()
        head.embedding_dim, head.weight = config.hidden_size, torch.empty(1)
        head.get_sharded_to_full_mapping = lambda: None
        processor.vocab_size = config.vocab_size
        return {**found, f"{whole}lm_head": head, f"{whole}logits_processor": processor}


def expert_names(model_type: str) -> tuple[str, str, str]:
    """Return the names of an expert's gate, down and up in a checkpoint, in vLLM's order."""
    return ("w1", "w2", "w3") if model_type == "mixtral" else ("gate_proj", "down_proj", "up_proj")
