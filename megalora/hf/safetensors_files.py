"""The tensors of a Hugging Face model directory, experts always under their own names."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from megalora.hf.block_scaled import PlainFiles
from megalora.hf.factors import summarise
from megalora.hf.stacked_weights import InStack, stacked_module, unstack
from megalora.model.family import DEFAULT_NAMES, Names
from megalora.model.loaded import is_harmless


class HFWeights:
    """A model directory's tensors, read in slices; names: of the model's family."""

    def __init__(self, directory: str | Path, names: Names = DEFAULT_NAMES) -> None:
        self.files, self.names = PlainFiles(Path(directory)), names
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stacked: dict[str, InStack] = {}
        self._stored_as: dict[str, str] = {}
        for name in self.files:
            if is_harmless(name) or names.is_beside(name):
                continue
            if module := stacked_module(names.as_stored(name), names):
                for known, shape, place in unstack(name, self.files.shape(name), module, names):
                    self.shapes[known], self._stacked[known] = shape, place
            else:
                known = names.as_stored(name)
                self.shapes[known] = self.files.shape(name)
                self._stored_as[known] = name
        table, head = f"{names.embedding}.weight", f"{names.unembedding}.weight"
        # Of a tied model the one or the other may be stored.
        self._alone = {table: head} if head in self.shapes and table not in self.shapes else {}
        self._stored_as |= self._alone

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

    def stored(self, name: str) -> str:
        """Return what the files call a tensor."""
        return self._stored_as.get(name, name)

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        name = self.stored(name)
        stored = self._stacked[name].tensor if name in self._stacked else name
        return self.files.directory / self.files.files[stored]

    def read(
        self, name: str, first: int, count: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Read rows first:first + count, and of them `columns`, of one tensor."""
        name = self.stored(name)
        if place := self._stacked.get(name):
            return place.read(self.files, first, count, columns)
        rest = () if columns is None else (slice(*columns),)
        return self.files.part(name, (slice(first, first + count), *rest))
