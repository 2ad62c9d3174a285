"""The few functions of Megatron itself that cannot run, or run wrongly, without a GPU."""

import functools
import importlib
import importlib.util
import logging
import os
import sys
import types
from typing import Any

import torch

from megalora.cpu import async_save
from megalora.cpu.optimizer import FusedAdam


def install() -> None:
    """Import megatron.core under the facade and patch it."""
    _fake_wgrad_kernel()
    _import_without_jit_fuser()
    _patch_config()
    _patch_rng()
    _patch_norm()
    _patch_moe()
    _patch_optimizer()
    _patch_attention()
    _patch_latent_attention()
    _patch_dataset_helpers()
    async_save.install()


def _fake_wgrad_kernel() -> None:
    """Provide apex's weight gradient kernel: gradient accumulation fusion is Megatron's default."""
    kernel: Any = types.ModuleType("fused_weight_gradient_mlp_cuda")
    kernel.wgrad_gemm_accum_fp32 = kernel.wgrad_gemm_accum_fp16 = _accumulate_wgrad
    sys.modules[kernel.__name__] = kernel


def _accumulate_wgrad(x: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += grad_outputᵀ x, in main_grad's precision."""
    wgrad = grad_output.flatten(0, -2).t().to(main_grad.dtype)
    main_grad.addmm_(wgrad, x.flatten(0, -2).to(main_grad.dtype))


def _import_without_jit_fuser() -> None:
    """Import megatron.core while torch.compile does nothing.

    Megatron's jit_fuser is torch.compile, and would start a C++ compiler for every small function
    that it decorates. User code keeps the real one.
    """
    patched: Any = torch
    compile_ = torch.compile
    patched.compile = lambda model=None, **kwargs: model if callable(model) else lambda f: f
    try:
        importlib.import_module("megatron.core.models.gpt")
    finally:
        patched.compile = compile_


# Default in Megatron's flags, and only in TransformerEngine.
_TE_ONLY = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
}


def _patch_config() -> None:
    """Take Megatron's own layers where TransformerEngine is missing.

    The settings that need it are Megatron's defaults, and launch scripts should run unchanged.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer.transformer_config import TransformerConfig

    if HAVE_TE:
        return
    check = TransformerConfig.__post_init__

    def check_local(self: TransformerConfig) -> None:
        changed = {name: value for name, value in _TE_ONLY.items() if getattr(self, name) != value}
        for name, value in changed.items():
            setattr(self, name, value)
        if changed:
            settings = ", ".join(f"{name}={value}" for name, value in changed.items())
            _say_once(f"without TransformerEngine the CPU runs {settings}")
        check(self)

    patched: Any = TransformerConfig
    patched.__post_init__ = check_local


@functools.cache
def _say_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"megalora: {message}", flush=True)


def _patch_rng() -> None:
    import megatron.core.tensor_parallel.random as random

    patched: Any = random
    # It reaches for torch.cuda.default_generators, which is empty.
    patched._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: (
        torch.set_rng_state(new_state)
    )
    # The tracker warns when fork() changes the CPU generator; here that is its purpose.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


def _patch_norm() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    patched: Any = WrappedTorchNorm
    patched.__new__ = staticmethod(_build_norm)


def _build_norm(
    cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: object
) -> torch.nn.Module:
    """Build torch's norm, also under sequence parallelism, which WrappedTorchNorm refuses.

    Its weights are marked for Megatron to sum their gradients over the tensor-parallel group.
    persist_layer_norm and memory_efficient_layer_norm only pick a kernel and are ignored.
    """
    if config.layernorm_zero_centered_gamma:
        raise ValueError(
            "layernorm_zero_centered_gamma True needs TransformerEngine: set it to False on the CPU"
        )
    norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
    norm = norm_class(hidden_size, eps=eps)
    for parameter in norm.parameters():
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
    return norm


def _patch_moe() -> None:
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    patched: Any = token_dispatcher
    patched.maybe_move_tensor_to_cpu = _to_numpy


def _to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Turn split sizes into numpy as asked; Megatron does so for CUDA tensors only."""
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _patch_optimizer() -> None:
    """Give Megatron FusedAdam semantics, which the distributed optimizer's checkpoints rely on."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distrib_optimizer

    for module in (optimizer, distrib_optimizer):
        patched: Any = module
        patched.Adam = FusedAdam
    optimizer.USING_PYTORCH_OPTIMIZER = False
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        distrib_optimizer.HAVE_APEX_OR_TE = True
        distrib_optimizer.USING_APEX_OPTIMIZER = True


def _patch_attention() -> None:
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from megatron.core.models.backends import LocalSpecProvider

    from megalora.cpu.attention import CpuCoreAttention

    for provider in (LocalSpecProvider, TESpecProvider):
        patched: Any = provider
        patched.core_attention = lambda self: CpuCoreAttention


def _patch_latent_attention() -> None:
    """Sum the gradient of the shared rotary key over tensor-parallel ranks.

    Every rank's heads use it, but where the down projection is column parallel, as only the local
    layers have it, Megatron gathers it by an operation whose dgrad keeps each rank's own part.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    project = MLASelfAttention._qkv_down_projection

    def down_project(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        query, key_value = project(self, hidden_states)
        sizes = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        if key_value.size(-1) == sum(sizes):
            return query, key_value
        key_value = mappings.gather_from_tensor_model_parallel_region(key_value)
        if self.config.sequence_parallel:
            # The caller gathers the rotary part over the sequence; dgrad: reduce-scatter.
            return query, mappings.scatter_to_sequence_parallel_region(key_value)
        latent, rotary = key_value.split(sizes, dim=-1)
        # dgrad: all-reduce
        rotary = mappings.copy_to_tensor_model_parallel_region(rotary)
        return query, torch.cat([latent, rotary], dim=-1)

    patched: Any = MLASelfAttention
    patched._qkv_down_projection = down_project


def _patch_dataset_helpers() -> None:
    """Skip `make` inside site-packages where the wheel brings the compiled dataset helpers."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is None:
        return
    import megatron.core.datasets.utils as utils

    patched: Any = utils
    patched.compile_helpers = lambda: None
