"""FP8 weights with block scales, as the published -FP8 models have them, read as plain numbers."""

from pathlib import Path

from torch import Tensor

from megalora.hf.files import TensorFiles
from megalora.model.config_json import load_config
from megalora.model.loaded import SCALE, scale_block


class PlainFiles(TensorFiles):
    """The tensors of a model's directory; FP8 weights are multiplied with their scales, in fp32.

    W[i, j] = code[i, j] * scale[i // rows, j // columns], of the slice that is asked for and no
    more. Scales are no tensors here. Experts may be stacked before the rows.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        scales = [name for name in self.files if name.endswith(SCALE)]
        self._scales = {name.removesuffix(SCALE): self.files.pop(name) for name in scales}
        self._block = scale_block(load_config(directory)) if scales else None
        if scales and not self._block:
            raise ValueError(f"config.json does not say which blocks {scales[0]} scales")

    def is_scaled(self, name: str) -> bool:
        """Say whether a tensor is stored as FP8 with block scales."""
        return name in self._scales

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        return self.part(name, (slice(None),)) if self.is_scaled(name) else super().tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Read a slice of one tensor, and the scales of its blocks."""
        codes = super().part(name, index)
        if self._block is None or not self.is_scaled(name):
            return codes
        shape, (high, wide) = self.shape(name), self._block
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        *_, rows, columns = (range(*s.indices(n)) for s, n in zip(index, shape, strict=True))
        down, across = _blocks(rows, high), _blocks(columns, wide)
        stored = self._handle(self._scales[name]).get_slice(name + SCALE)
        scales = stored[(*index[:-2], _slice(down), _slice(across))].float()
        scales = scales.repeat_interleave(wide, -1)[..., columns.start - across.start * wide :]
        weight = codes.float()
        # A row of blocks at a time: scales of all elements would be a second weight.
        for number, block in enumerate(down):
            first, last = max(block * high - rows.start, 0), (block + 1) * high - rows.start
            weight[..., first:last, :] *= scales[..., number, None, : len(columns)]
        return weight


def _blocks(elements: range, size: int) -> range:
    """Return the blocks that elements lie in."""
    return range(elements.start // size, -(-elements.stop // size))


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)
