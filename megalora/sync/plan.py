"""What a server is given of an adapter: known from its sizes, and made layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalora.config import LoRAConfig
from megalora.hf.adapters import to_hf
from megalora.hf.factors import LoRAFactors, check_factors
from megalora.hf.files import ADAPTER, Planned, save_stream, write_json
from megalora.hf.foreign import CONFIG_NAME
from megalora.hf.peft import Format, adapted_base, adapter_files
from megalora.hf.uniform import one_rank_and_scale
from megalora.model.families import names_of
from megalora.model.shape import ModelShape

OUTPUT_B = "output_layer_lora.lora_B"
Named = Iterator[tuple[str, Tensor]]


class Plan:
    """The tensors of an adapter in a format, by the names that its readers have for them.

    sizes: shape and precision of each, in the order in which the layers give them.
    adapter_config: what adapter_config.json says.
    """

    def __init__(
        self,
        whole: Mapping[str, tuple[Sequence[int], torch.dtype]],
        config: LoRAConfig,
        shape: ModelShape,
        format: Format,
        *,
        base_model_name: str = "",
    ) -> None:
        """Plan from the adapter's own tensors, whole: shape and precision by Megatron's name.

        Raises ValueError where the format cannot say it.
        """
        rows = whole[OUTPUT_B][0][0] if OUTPUT_B in whole else 0
        self._config = config
        self._format: Format = format
        self._shape = replace(shape, vocab_size=shape.vocab_size or rows)
        # NOTE: of values that no scale leaves as they are but a power of two, so that a precision
        # that `uniform` has to choose by them is right for all.
        values = {
            name: torch.full((), 1 / 3, dtype=dtype).expand(*size)
            for name, (size, dtype) in whole.items()
        }
        factors = to_hf(values, config, self._shape, initial=values, by_values=False)
        self._one = one_rank_and_scale(factors.values())
        self._base = adapted_base(
            factors,
            names_of(shape.model_type),
            shape.num_layers,
            shape.moe_layers or None,
            shape.delta_layers,
            is_moe=bool(shape.num_moe_experts),
        )
        tensors, fields = self._files(factors)
        self.sizes = {name: _size(tensor) for name, tensor in tensors.items()}
        self.adapter_config: dict[str, Any] = {"base_model_name_or_path": base_model_name, **fields}

    def tensors(
        self, layers: Mapping[str, Tensor], initial: Mapping[str, Tensor] | None = None
    ) -> Named:
        """Yield the tensors of some whole layers, given by Megatron's names, by the format's.

        initial: start values of all layers of a `pissa` adapter. Raises ValueError, by name, for
        values that are not finite.
        """
        start = {name: initial[name] for name in layers} if initial else None
        factors = to_hf(layers, self._config, self._shape, initial=start, by_values=False)
        check_factors(factors)
        for name, tensor in self._files(factors)[0].items():
            values = tensor.make() if isinstance(tensor, Planned) else tensor
            yield name, values.to(self.sizes[name].dtype)

    def write(self, directory: Path, tensors: Named) -> None:
        """Fill an empty directory with all tensors, which come one by one, as PEFT's files."""
        save_stream(directory / f"{ADAPTER}.safetensors", self.sizes, tensors)
        write_json(directory / CONFIG_NAME, self.adapter_config)

    def _files(
        self, factors: Mapping[str, LoRAFactors]
    ) -> tuple[dict[str, Tensor | Planned], dict[str, Any]]:
        experts = self._shape.num_moe_experts or None
        return adapter_files(factors, self._format, self._base, experts, one=self._one)


def _size(tensor: Tensor | Planned) -> Planned:
    """Return a tensor's shape and precision without its values."""
    return Planned(tuple(tensor.shape), tensor.dtype, lambda: torch.empty(0))
