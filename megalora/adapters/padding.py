"""Megatron's padding of the vocabulary, left out of the softmax.

Its rows are no tokens, and how many there are depends on the tensor-parallel size. In the softmax
they would make the loss and every gradient depend on it too, and differ from Hugging Face's.
"""

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor


def leave_out_padding(chunk: torch.nn.Module, vocab_size: int) -> None:
    """Give the padding's logits the lowest number, to whoever asks a chunk's output layer.

    Losses, those of multi-token prediction too, and logits to sample from come from its calls.
    vocab_size: rows that are tokens; the model has as many or more.
    """
    for module in chunk.modules():
        if isinstance(module, LanguageModule) and hasattr(module, "output_layer"):
            group = module.pg_collection.tp
            padding = _Padding(vocab_size, module.vocab_size, group.rank())  # type: ignore[arg-type]
            module.output_layer.register_forward_hook(padding)  # type: ignore[operator]


class _Padding:
    """The hook of one output layer: fills the padded columns of its logits."""

    def __init__(self, vocab_size: int, padded_size: int, tp_rank: int) -> None:
        self.vocab_size, self.padded_size, self.tp_rank = vocab_size, padded_size, tp_rank

    def __call__(self, _layer: torch.nn.Module, _inputs: object, output: tuple) -> None:
        """Fill in place; output: (logits [s, b, v/tp], or [s, b, v] where gathered, bias)."""
        logits: Tensor = output[0]
        width = logits.shape[-1]
        first = 0 if width == self.padded_size else self.tp_rank * width
        own = max(0, self.vocab_size - first)
        if own < width:
            # Finite: a rank may have no other column, whose largest it subtracts. Their softmax is
            # 0, and so is their gradient. Autograd, told of it, would copy that of all columns.
            with torch.no_grad():
                logits[..., own:].fill_(torch.finfo(logits.dtype).min)
