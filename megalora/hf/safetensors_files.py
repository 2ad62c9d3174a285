"""The tensors of a Hugging Face model directory, experts always under their own names."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from megalora.hf.block_scaled import PlainFiles
from megalora.hf.factors import summarise
from megalora.model.family import DEFAULT_NAMES, Names, without_numbers
from megalora.model.loaded import is_harmless
from megalora.model.shape import MAX_SIZES


class HFWeights:
    """A model directory's tensors, read in slices; names: of the model's family."""

    def __init__(self, directory: str | Path, names: Names = DEFAULT_NAMES) -> None:
        self.files, self.names = PlainFiles(Path(directory)), names
        self.shapes: dict[str, tuple[int, ...]] = {}
        # Of an expert's weight: the tensor of all experts, its number there, its first row.
        self._stacked: dict[str, tuple[str, int, int]] = {}
        self._stored_as: dict[str, str] = {}
        for name in self.files:
            if is_harmless(name):
                continue
            pattern, numbers = without_numbers(name)
            module = names.stacked.get(pattern.removeprefix(names.layer))
            if module:
                parts = names.in_layer(module)
                self._unstack(name, [part.format(*numbers, "{}") for part in parts])
            else:
                known = names.as_stored(name)
                self.shapes[known] = self.files.shape(name)
                self._stored_as[known] = name
        table, head = f"{names.embedding}.weight", f"{names.unembedding}.weight"
        # Of a tied model the one or the other may be stored.
        self._alone = {table: head} if head in self.shapes and table not in self.shapes else {}
        self._stored_as |= self._alone

    def _unstack(self, name: str, parts: list[str]) -> None:
        """Take down where each expert's parts are; `{}` in a part's name is its number."""
        shape = self.files.shape(name)
        if len(shape) != 3:
            raise ValueError(f"{name} has shape {list(shape)}: expected [experts, out, in]")
        num_experts, rows = shape[0], shape[1] // len(parts)
        if not 0 < num_experts <= MAX_SIZES["num_moe_experts"] or shape[1] % len(parts):
            raise ValueError(
                f"{name} has shape {list(shape)}: expected [experts, out, in] of at most "
                f"{MAX_SIZES['num_moe_experts']:,} experts, and gate and up of one size"
            )
        for expert in range(num_experts):
            for number, part in enumerate(parts):
                weight = f"{part.format(expert)}.weight"
                self.shapes[weight] = (rows, shape[2])
                self._stacked[weight] = (name, expert, number * rows)

    def check(
        self,
        expected: dict[str, tuple[int, ...]],
        *,
        tied: bool,
        may_have: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Raise ValueError for missing, unexpected and misshapen tensors, by name.

        may_have: says of a tensor that is not expected whether it may be there.
        """
        # A tied model may carry its unembedding along as a copy.
        given = {n: s for n, s in self.shapes.items() if not (tied and n == "lm_head.weight")}
        if tied:
            given |= {name: self.shapes[head] for name, head in self._alone.items()}
        missing = sorted(expected.keys() - given.keys())
        unexpected = sorted(n for n in given.keys() - expected.keys() if not may_have(n))
        wrong = [
            f"{name} {list(given[name])} (expected {list(shape)})"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ]
        problems = {"is missing": missing, "has unexpected": unexpected, "has misshapen": wrong}
        found = [f"{what} {summarise(names)}" for what, names in problems.items() if names]
        if found:
            cure = (
                " (is it tied? then set tie_word_embeddings true)"
                if missing == ["lm_head.weight"]
                else ""
            )
            raise ValueError(
                f"{self.files.directory} {'; '.join(found)}: its tensors and its config.json are "
                f"not of one model{cure}"
            )

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        name = self._stored_as.get(name, name)
        stored, _, _ = self._stacked.get(name, (name, 0, 0))
        return self.files.directory / self.files.files[stored]

    def read(
        self, name: str, first: int, count: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Read rows first:first + count, and of them `columns`, of one tensor."""
        name = self._stored_as.get(name, name)
        rest = () if columns is None else (slice(*columns),)
        if name not in self._stacked:
            return self.files.part(name, (slice(first, first + count), *rest))
        stacked, expert, offset = self._stacked[name]
        rows = slice(offset + first, offset + first + count)
        return self.files.part(stacked, (slice(expert, expert + 1), rows, *rest))[0]
