"""Whole layers that an adapter carries beside its factors: the base's own, or trained ones.

PEFT saves the embeddings along where it thinks that the vocabulary was resized, or where asked to;
the base of an adapted unembedding; the modules of `modules_to_save`; and biases that were trained.
When it loads them, they take the place of the base's.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megalora.adapters.finite import all_finite
from megalora.hf.factors import PRECISIONS, summarise
from megalora.hf.files import TensorFiles
from megalora.model.decoder_names import LANGUAGE

_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")
# Of tied embeddings one may be stored alone.
_TIED = {
    "lm_head.weight": "model.embed_tokens.weight",
    "model.embed_tokens.weight": "lm_head.weight",
}


def trained_layers(
    adapter: TensorFiles, whole: Mapping[str, str], base: str | Path
) -> dict[str, Tensor]:
    """Return the copies that are not the base's own tensors, by these' names.

    whole: key in the adapter by the name of the base's tensor. Raises ValueError for copies of what
    the base does not have, or has in another size.
    """
    trained: dict[str, Tensor] = {}
    files = _weights(base, whole) if whole else None
    for name, key in whole.items():
        assert files is not None
        stored = next((place for place in _places(name) if place in files), None)
        if stored is None:
            raise ValueError(
                f"adapter has the whole layer {key}, which its base does not have: it was trained "
                "on another class of the model (such as one that classifies), or on another model"
            )
        copy = adapter.tensor(key)
        _check(name, key, copy, files.shape(stored))
        if not _is_same(copy, files.tensor(stored)):
            trained[name] = copy
    return trained


def _places(name: str) -> list[str]:
    """Return what files may call a tensor, the likeliest first."""
    alone = (name, _TIED.get(name, name))
    return [*alone, *(f"{LANGUAGE}{each.removeprefix('model.')}" for each in alone)]


def refuse_trained(names: Iterable[str]) -> None:
    """Raise ValueError where there are layers that were trained, which no LoRA factors hold."""
    if found := list(names):
        raise ValueError(
            f"adapter has whole layers that are not its base's: {summarise(found)}: "
            f"{_what(found)} trained beside the factors: merge the adapter into its base "
            "(megalora merge), and give the result as the base"
        )


def said_of_whole(whole: Iterable[str]) -> str:
    """Say what whole layers may be, where there is no base to compare them with."""
    found = list(whole)
    return (
        f"adapter has whole layers beside its factors: {summarise(found)}: where they are the "
        f"base's own they mean nothing, else {_what(found)} trained: only with the base "
        "(--hf-model) can that be told"
    )


def check_without_base(whole: Mapping[str, str]) -> None:
    """Raise ValueError for whole layers that may have been trained; see `said_of_whole`.

    The base that an adapter is around was frozen, unless it was resized: that is said in a warning.
    """
    frozen = [name for name, key in whole.items() if ".base_layer." in key]
    if len(frozen) < len(whole):
        raise ValueError(said_of_whole(name for name in whole if name not in frozen))
    if frozen:
        warnings.warn(
            f"adapter has its base's {summarise(frozen)}, not compared: that takes --hf-model",
            stacklevel=4,
        )


def _what(names: Iterable[str]) -> str:
    return "the embeddings were" if all(n.endswith(_EMBEDDINGS) for n in names) else "they were"


def _weights(base: str | Path, whole: Iterable[str]) -> TensorFiles:
    try:
        return TensorFiles(Path(base))
    except ValueError as error:
        raise ValueError(
            f"adapter has whole layers ({summarise(list(whole))}), which have to be compared with "
            f"the base's: {error}"
        ) from None


def _check(name: str, key: str, copy: Tensor, size: tuple[int, ...]) -> None:
    if copy.dtype not in PRECISIONS:
        raise ValueError(
            f"adapter has the whole layer {key} in {copy.dtype}: a quantized base's, saved along: "
            "save the adapter by PEFT's save_pretrained"
        )
    if copy.numel() == 0:
        raise ValueError(f"adapter has the whole layer {key} without values: {ZERO_3}")
    if not all_finite(copy):
        raise ValueError(
            f"adapter has NaN or infinite values in {key}: use a checkpoint from before training "
            "diverged"
        )
    if tuple(copy.shape) == size:
        return
    if copy.dim() == len(size) == 2 and copy.shape[1] == size[1] and name.endswith(_EMBEDDINGS):
        raise ValueError(
            f"adapter has {key} with {copy.shape[0]} rows, its base has {size[0]}: the embeddings "
            "were resized for other tokens: resize the base's as they were (transformers' "
            "resize_token_embeddings), merge with PEFT, and give the result as the base"
        )
    raise ValueError(
        f"adapter has the whole layer {key} {list(copy.shape)}, its base {list(size)}: it belongs "
        "to another model"
    )


def _is_same(copy: Tensor, own: Tensor) -> bool:
    """Say whether one tensor is the other, but for the rounding to its precision."""
    return torch.equal(copy.to(own.dtype), own) or torch.equal(copy, own.to(copy.dtype))


# What empty and flat tensors come of.
ZERO_3 = (
    "DeepSpeed's ZeRO-3 (or FSDP) had them in parts when they were saved: save again with "
    "stage3_gather_16bit_weights_on_model_save, or gather a checkpoint by zero_to_fp32.py"
)
