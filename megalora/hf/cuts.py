"""Which part of a Hugging Face tensor a rank holds, by the way in which a linear is cut."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megalora.model.facts import delta_parts
from megalora.model.family import Names
from megalora.model.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of how many equal parts of a dimension a rank holds."""

    index: int = 0
    count: int = 1

    def of(self, size: int, what: str) -> tuple[int, int]:
        """Return the first and one past the last index of this part of `size`."""
        if size % self.count:
            raise ValueError(f"{what} {size} is not divisible by {self.count} ranks")
        part = size // self.count
        return self.index * part, (self.index + 1) * part


@dataclass(frozen=True, slots=True)
class Placement:
    """This rank's parts: of dense linears, of experts' linears, and of the experts."""

    tp: Shard
    expert_tp: Shard
    ep: Shard


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows first:first + count of a parameter are rows hf_first and on of a Hugging Face tensor.

    columns: of the Hugging Face tensor; None means all.
    more: by how much the Hugging Face tensor's values exceed the parameter's, as where a norm's
        factors are 1 + weight in Megatron alone.
    """

    name: str
    first: int
    count: int
    hf_first: int
    columns: tuple[int, int] | None = None
    more: float = 0.0


@dataclass(frozen=True, slots=True)
class Block:
    """Rows that a fused linear has of one Hugging Face tensor, from its row `first` on."""

    name: str
    rows: int
    first: int = 0


def along_input(name: str, shape: Sequence[int], shard: Shard) -> list[Piece]:
    """Return the piece of a tensor [rows, columns] that reads what ranks share out."""
    return [Piece(name, 0, shape[0], 0, shard.of(shape[1], name))]


def by_blocks(blocks: Iterable[Block], shard: Shard) -> list[Piece]:
    """Return a rank's rows of a linear that stacks blocks: its part of each, one after the other.

    As [gate_k; up_k], and not a slice of the whole.
    """
    pieces: list[Piece] = []
    row = 0
    for block in blocks:
        first, last = shard.of(block.rows, f"rows of {block.name}")
        pieces.append(Piece(block.name, row, last - first, block.first + first))
        row += last - first
    return pieces


def consecutive(name: str, sizes: Iterable[int]) -> list[Block]:
    """Return the blocks of so many rows each that one tensor has, one after the other."""
    blocks: list[Block] = []
    first = 0
    for rows in sizes:
        blocks.append(Block(name, rows, first))
        first += rows
    return blocks


def by_period(blocks: Iterable[Block], shard: Shard, what: str) -> list[Piece]:
    """Return a rank's rows of a linear whose blocks lie one after the other, cut as one whole.

    Where blocks repeat, as q, k and v of every query group, a rank may hold a part of a period.
    """
    blocks = list(blocks)
    first, last = shard.of(sum(block.rows for block in blocks), what)
    pieces: list[Piece] = []
    row = 0
    for block in blocks:
        begin, end = max(row, first), min(row + block.rows, last)
        if begin < end:
            pieces.append(Piece(block.name, begin - first, end - begin, block.first + begin - row))
        row += block.rows
    return pieces


def by_parts(parts: Iterable[Sequence[Block]], shard: Shard, what: str) -> list[Piece]:
    """Return a rank's rows of a linear that stacks parts: its slice of each, one after the other.

    Each part may lie in several places, as those of a delta net's heads.
    """
    pieces: list[Piece] = []
    row = 0
    for blocks in parts:
        own = by_period(blocks, shard, what)
        pieces += [replace(piece, first=row + piece.first) for piece in own]
        row += sum(piece.count for piece in own)
    return pieces


def delta_blocks(names: Sequence[str], own: Names, shape: ModelShape) -> list[list[Block]]:
    """Return the rows of a delta net's in_proj, by its parts, in Hugging Face's tensors.

    names: of these tensors; own: of the family, which say which parts each of them joins.
    """
    joined = iter(names)
    rows, parts = delta_parts(shape), list[list[Block]]()
    for module in own.modules["self_attention.in_proj"]:
        name, sizes = next(joined), [rows[part] for part in own.parts_of(module)]
        periods = shape.linear_num_key_heads if own.joined_by_head else 1
        for number, size in enumerate(sizes):
            each, period = size // periods, sum(sizes) // periods
            first = sum(sizes[:number]) // periods
            parts.append([Block(name, each, head * period + first) for head in range(periods)])
    return parts


def query_groups(names: Sequence[str], shape: ModelShape) -> list[Block]:
    """Return the rows of linear_qkv: q, k and v of every query group, in Hugging Face's order.

    names: of their tensors, or of the one that has all of q, of k and of v, one after the other.
    With an output gate, whose rows alternate with q's for each head there, and follow them here.
    """
    d, queries = shape.kv_channels, shape.heads_per_group * shape.kv_channels
    if shape.attention_output_gate:
        query, key, value = names
        heads = shape.heads_per_group
        return [
            block
            for group in range(shape.num_query_groups)
            for block in (
                *(
                    Block(query, d, (2 * (group * heads + head) + is_gate) * d)
                    for is_gate in (0, 1)
                    for head in range(heads)
                ),
                Block(key, d, group * d),
                Block(value, d, group * d),
            )
        ]
    kv = shape.num_query_groups * d
    firsts = (0, shape.query_size, shape.query_size + kv) if len(names) == 1 else (0, 0, 0)
    names = [*names] * (3 // len(names))
    return [
        Block(name, size, first + group * size)
        for group in range(shape.num_query_groups)
        for name, size, first in zip(names, (queries, d, d), firsts, strict=True)
    ]


def of_vocabulary(name: str, size: int, num_rows: int, shard: Shard) -> list[Piece]:
    """Return the piece of a table of `size` rows, of which each rank has num_rows with padding."""
    if num_rows * shard.count < size:
        raise ValueError(
            f"the model's vocabulary has {num_rows * shard.count} rows, config.json says {size}: "
            f"build it with --vocab-size {size}"
        )
    first = shard.index * num_rows
    count = min(num_rows, size - first)
    return [Piece(name, 0, count, first)] if count > 0 else []
