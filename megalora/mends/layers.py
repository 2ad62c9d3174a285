"""Megatron's own layers where TransformerEngine and apex are missing.

The settings that need them are defaults of Megatron's flags, and launch scripts should run
unchanged.
"""

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.tensor_parallel import layers
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig

from megalora.replace import Patch, around, instead

# Default in Megatron's flags, and only in TransformerEngine.
_TE_ONLY = {
    "transformer_impl": "local",
    "apply_rope_fusion": False,
    "moe_grouped_gemm": False,
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
}


def change_and_check(check: Callable[[TransformerConfig], None], self: TransformerConfig) -> None:
    """Change the settings of a configuration that their packages are missing for."""
    _change(self)
    check(self)


def _change(config: TransformerConfig) -> None:
    if not HAVE_TE:
        _set(config, "TransformerEngine", _TE_ONLY)
    # Without the kernel Megatron's linears end the run, in TransformerEngine's models the last one.
    if not layers._grad_accum_fusion_available:
        _set(config, "apex", {"gradient_accumulation_fusion": False})
    # Megatron's own attention looks for the kernel in the first step in half precision, and fails.
    is_local = config.transformer_impl == "local"
    if is_local and importlib.util.find_spec("scaled_masked_softmax_cuda") is None:
        _set(config, "apex", {"masked_softmax_fusion": False})


def _set(config: TransformerConfig, package: str, settings: dict[str, object]) -> None:
    changed = {name: value for name, value in settings.items() if getattr(config, name) != value}
    for name, value in changed.items():
        setattr(config, name, value)
    if changed:
        listed = ", ".join(f"{name}={value}" for name, value in changed.items())
        _say_once(f"without {package} this run has {listed}")


@functools.cache
def _say_once(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"megalora: {message}", flush=True)


class _AroundZero(torch.nn.Module):
    """A norm of torch's whose factors are 1 + weight, as TransformerEngine's zero-centred gamma."""

    weight: torch.nn.Parameter

    def reset_parameters(self) -> None:
        """Start with factors of 1."""
        super().reset_parameters()  # type: ignore[misc]
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm in fp32: 1 + weight in half precision forgets small weights. x: [..., h]."""
        precise = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.scaled(precise, 1 + self.weight.to(precise.dtype)).to(x.dtype)

    def scaled(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Return the norm of x times factors [h]."""
        raise NotImplementedError


class RMSNormAroundZero(_AroundZero, torch.nn.RMSNorm):
    """`--apply-layernorm-1p` of an RMSNorm."""

    def scaled(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Divide by the root of the mean square."""
        return F.rms_norm(x, self.normalized_shape, factors, self.eps)


class LayerNormAroundZero(_AroundZero, torch.nn.LayerNorm):
    """`--apply-layernorm-1p` of a LayerNorm."""

    def scaled(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Subtract the mean, divide by the standard deviation, add the bias."""
        return F.layer_norm(x, self.normalized_shape, factors, self.bias.to(x.dtype), self.eps)


def build_norm(
    cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **kwargs: object
) -> torch.nn.Module:
    """Build torch's norm, also under sequence parallelism, which WrappedTorchNorm refuses.

    Its weights are marked for Megatron to sum their gradients over the tensor-parallel group.
    persist_layer_norm (a default) and memory_efficient_layer_norm only pick a kernel of apex and
    are ignored.
    """
    if config.layernorm_zero_centered_gamma:
        kinds = {"RMSNorm": RMSNormAroundZero, "LayerNorm": LayerNormAroundZero}
    else:
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
    if config.normalization not in kinds:
        raise ValueError(
            f"normalization {config.normalization!r} is not in torch: use {' or '.join(kinds)}"
        )
    norm = kinds[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010
    return norm


def without_fp8(
    init: Callable[..., None], self: CheckpointWithoutOutput, fp8: object = False
) -> None:
    """Ask for no state of FP8, which is TransformerEngine's, where that is missing."""
    init(self, fp8 if HAVE_TE else None)


PATCHES = (
    Patch(
        TransformerConfig,
        "__post_init__",
        ("self",),
        around(change_and_check),
        "settings whose packages (TransformerEngine, apex) are missing are defaults of flags",
    ),
    Patch(
        WrappedTorchNorm,
        "__new__",
        ("config", "hidden_size", "eps"),
        instead(build_norm),
        "it refuses `persist_layer_norm`, a default, sequence parallelism and zero-centred gamma",
    ),
    Patch(
        CheckpointWithoutOutput,
        "__init__",
        ("fp8",),
        around(without_fp8),
        "recomputing outputs asks for TransformerEngine's FP8 state, also where there is none",
    ),
)
