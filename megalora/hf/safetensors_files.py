"""The tensors of a Hugging Face model directory, experts always under their own names."""

import re
from pathlib import Path

from torch import Tensor

from megalora.hf.factors import summarise
from megalora.hf.files import TensorFiles

# transformers 5 may store a layer's experts as gate_up_proj [E, 2 f, h] and down_proj [E, h, f].
_FUSED = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_EXPERT = re.compile(
    r"(model\.layers\.\d+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight"
)
# Buffers that old checkpoints carry along and every implementation computes itself.
_IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class HFWeights:
    """A model directory's tensors, read in slices."""

    def __init__(self, directory: str | Path) -> None:
        self.files = TensorFiles(Path(directory))
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in self.files:
            if _IGNORED.fullmatch(name):
                continue
            fused = _FUSED.fullmatch(name)
            if fused:
                self.shapes |= self._unfused(name, fused.group(1), fused.group(2))
            else:
                self.shapes[name] = self.files.shape(name)

    def _unfused(self, name: str, prefix: str, kind: str) -> dict[str, tuple[int, ...]]:
        shape = self.files.shape(name)
        if len(shape) != 3:
            raise ValueError(f"{name} has shape {list(shape)}: expected [experts, out, in]")
        num, rows, columns = shape
        halves = {"gate_proj": rows // 2, "up_proj": rows // 2}
        parts = halves if kind == "gate_up_proj" else {"down_proj": rows}
        return {
            f"{prefix}.{expert}.{part}.weight": (size, columns)
            for expert in range(num)
            for part, size in parts.items()
        }

    def check(self, expected: dict[str, tuple[int, ...]], *, tied: bool) -> None:
        """Raise ValueError for missing, unexpected and misshapen tensors, by name."""
        # A tied model may carry its unembedding along as a copy.
        given = {n: s for n, s in self.shapes.items() if not (tied and n == "lm_head.weight")}
        missing = sorted(expected.keys() - given.keys())
        unexpected = sorted(given.keys() - expected.keys())
        wrong = [
            f"{name} {list(given[name])} (expected {list(shape)})"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ]
        problems = {"is missing": missing, "has unexpected": unexpected, "has misshapen": wrong}
        found = [f"{what} {summarise(names)}" for what, names in problems.items() if names]
        if found:
            raise ValueError(
                f"{self.files.directory} {'; '.join(found)}: its tensors and its config.json are "
                "not of one model"
            )

    def read(
        self, name: str, first: int, count: int, columns: tuple[int, int] | None = None
    ) -> Tensor:
        """Read rows first:first + count, and of them `columns`, of one tensor."""
        index: tuple[slice, ...] = (slice(first, first + count),)
        if columns is not None:
            index += (slice(*columns),)
        expert = _EXPERT.fullmatch(name)
        if name in self.files or not expert:
            return self.files.part(name, index)
        prefix, number, projection = expert.group(1), int(expert.group(2)), expert.group(3)
        if projection == "down_proj":
            fused = f"{prefix}.down_proj"
        else:
            fused = f"{prefix}.gate_up_proj"
            if projection == "up_proj":
                half = self.shapes[name][0]
                index = (slice(first + half, first + half + count), *index[1:])
        return self.files.part(fused, (slice(number, number + 1), *index))[0]
