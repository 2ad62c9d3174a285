"""FP8 weights with block scales, and MXFP4 experts, read as plain numbers."""

from pathlib import Path

import torch
from torch import Tensor

from megalora.hf.mxfp4 import numbers_of
from megalora.model.config_json import load_config
from megalora.model.loaded import SCALE, scale_block
from megalora.model.mxfp4 import BLOCK, PlainHeaders


class PlainFiles(PlainHeaders):
    """The tensors of a model's directory; FP8 weights are multiplied with their scales, in fp32.

    W[i, j] = code[i, j] * scale[i // rows, j // columns], of the slice that is asked for and no
    more. Scales are no tensors here. Experts may be stacked before the rows. MXFP4 becomes bf16,
    in which it is exact.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        scales = [name for name in self.files if name.endswith(SCALE)]
        self._of_blocks = {name.removesuffix(SCALE): self.files.pop(name) for name in scales}
        self._block = scale_block(load_config(directory)) if scales else None
        if scales and not self._block:
            raise ValueError(f"config.json does not say which blocks {scales[0]} scales")

    def is_scaled(self, name: str) -> bool:
        """Say whether a tensor is stored as FP8 or MXFP4 with block scales."""
        return name in self._of_blocks or name in self._packed

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        return self.part(name, (slice(None),)) if self.is_scaled(name) else super().tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> Tensor:
        """Read a slice of one tensor, and the scales of its blocks."""
        if not self.is_scaled(name):
            return super().part(name, index)
        shape = self.shape(name)
        index = (*index, *[slice(None)] * (len(shape) - len(index)))
        ranges = [range(*s.indices(n)) for s, n in zip(index, shape, strict=True)]
        if name in self._packed:
            return self._unpacked(name, *ranges)
        return self._multiplied(name, index, *ranges[-2:])

    def _multiplied(
        self, name: str, index: tuple[slice, ...], rows: range, columns: range
    ) -> Tensor:
        """Read a slice of FP8, in fp32."""
        assert self._block is not None
        weight = super().part(name, index).float()
        high, wide = self._block
        down, across = _blocks(rows, high), _blocks(columns, wide)
        stored = self._handle(self._of_blocks[name]).get_slice(name + SCALE)
        scales = stored[(*index[:-2], _slice(down), _slice(across))].float()
        scales = scales.repeat_interleave(wide, -1)[..., columns.start - across.start * wide :]
        # A row of blocks at a time: scales of all elements would be a second weight.
        for number, block in enumerate(down):
            first, last = max(block * high - rows.start, 0), (block + 1) * high - rows.start
            weight[..., first:last, :] *= scales[..., number, None, : len(columns)]
        return weight

    def _unpacked(self, name: str, experts: range, rows: range, columns: range) -> Tensor:
        """Read a slice of MXFP4, an expert at a time; stored are the columns, in blocks of rows."""
        found = torch.empty(len(experts), len(rows), len(columns), dtype=torch.bfloat16)
        blocks = _blocks(rows, BLOCK)
        first = rows.start - blocks.start * BLOCK
        for number, expert in enumerate(experts):
            index = slice(expert, expert + 1), _slice(columns), _slice(blocks)
            numbers = numbers_of(self._codes(name)[index], self._scales(name)[index])
            found[number] = numbers[0, :, first : first + len(rows)].mT
        return found


def _blocks(elements: range, size: int) -> range:
    """Return the blocks that elements lie in."""
    return range(elements.start // size, -(-elements.stop // size))


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)
