"""Which tensors a directory's safetensors files hold, by their headers; and of what sizes."""

import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from megalora.model.decoder_names import PREDICTING
from megalora.model.families import names_of
from megalora.model.family import without_numbers
from megalora.model.shape import ModelShape
from megalora.reading import open_plain, read_json

if TYPE_CHECKING:
    from torch import Tensor

MODEL = "model"
ADAPTER = "adapter_model"
_PICKLE = (
    "is a pickle, which can run code and is never loaded: convert it to safetensors, by "
    "transformers' or peft's from_pretrained and save_pretrained, if you trust it"
)
# What a directory without safetensors of the usual name may have instead.
_OTHER_FORMS: dict[str, dict[str, str]] = {
    MODEL: {
        "pytorch_model*.bin*": _PICKLE,
        "*.pth": _PICKLE,
        "*.gguf": "is a GGUF file, of llama.cpp: give the safetensors that it was made of",
        "model.*.safetensors": "is a variant, which is loaded by its name alone: rename it to "
        "model.safetensors",
        "consolidated*.safetensors": "has no tensor by the name that transformers gives it: give "
        "the directory with model.safetensors",
    },
    ADAPTER: {"adapter_model*.bin*": _PICKLE},
}
_MAX_NAME = 1000


class TensorFiles:
    """The tensors of a directory, by name, over all of its safetensors files.

    They are those that transformers loads: of STEM.safetensors, else all of the shards that the
    index names. Only headers are read until a tensor or a slice is asked for. Pickles are never
    opened.
    framework: `np` needs no torch, and gives shapes alone.
    """

    def __init__(self, directory: Path, stem: str = MODEL, *, framework: str = "pt") -> None:
        self.directory, self.stem, self.framework = Path(directory), stem, framework
        self.index = self.directory / f"{stem}.safetensors.index.json"
        self._open: dict[str, Any] = {}
        # Whatever bears the name: opening it says what is wrong with it.
        self.has_shards = os.path.lexists(self.index) and not os.path.lexists(self._single)
        self.files = self._locate()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process needs to read the same files; it opens them itself."""
        return {**vars(self), "_open": {}}

    @property
    def _single(self) -> Path:
        return self.directory / f"{self.stem}.safetensors"

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def file_names(self) -> list[str]:
        """Return the safetensors files in the order in which they first hold a tensor."""
        return list(dict.fromkeys(self.files.values()))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Return a tensor's precision in safetensors' letters, such as BF16."""
        return str(self._slice(name).get_dtype())

    def tensor(self, name: str) -> "Tensor":
        """Read one tensor."""
        return self._handle(self._file(name)).get_tensor(name)

    def part(self, name: str, index: tuple[slice, ...]) -> "Tensor":
        """Read a slice of one tensor, nothing else."""
        return self._slice(name)[index]

    def _file(self, name: str) -> str:
        if name not in self.files:
            raise ValueError(f"{self.directory} has no tensor {name}: is it a complete checkpoint?")
        return self.files[name]

    def _slice(self, name: str) -> Any:
        return self._handle(self._file(name)).get_slice(name)

    def _handle(self, file_name: str) -> Any:
        if file_name not in self._open:
            path = self.directory / file_name
            try:
                # Of a file that may not be read safe_open says that it is not there.
                open_plain(path, inside=self.directory).close()
                # NOTE: never a context manager: slices stay lazy as long as the handle lives.
                self._open[file_name] = safe_open(path, framework=self.framework, device="cpu")
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: the checkpoint is incomplete") from None
            except (SafetensorError, OSError, MemoryError) as error:
                raise ValueError(
                    f"{path} is not a whole safetensors file ({error}): download it again"
                ) from None
        return self._open[file_name]

    def _names(self, file_name: str) -> list[str]:
        names = self._handle(file_name).keys()
        if long := next((name for name in names if len(name) > _MAX_NAME), None):
            raise ValueError(
                f"{self.directory / file_name} has a tensor with a name of {len(long)} characters: "
                "it is no model's"
            )
        return names

    def _locate(self) -> dict[str, str]:
        if self.has_shards:
            return self._locate_by_index()
        if os.path.lexists(self._single):
            return dict.fromkeys(self._names(self._single.name), self._single.name)
        if any(self.directory.glob(f"{self.stem}-*-of-*.safetensors")):
            raise ValueError(f"{self.index} is missing beside its shards: download it again")
        for pattern, sentence in _OTHER_FORMS[self.stem].items():
            if found := sorted(self.directory.glob(pattern)):
                raise ValueError(f"{found[0]} {sentence}")
        raise ValueError(
            f"{self.directory} has neither {self._single.name} nor {self.index.name}: give the "
            "directory that has the weights, as safetensors"
        )

    def _locate_by_index(self) -> dict[str, str]:
        weight_map = read_weight_map(self.index)
        held = {file: self._names(file) for file in sorted(set(weight_map.values()))}
        # As transformers: all that the shards hold, of a name that two have the last.
        found = {name: file for file, names in held.items() for name in names}
        for name, file_name in weight_map.items():
            if name not in found:
                raise ValueError(f"{file_name} has no tensor {name}, which {self.index} promises")
        return found


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor that an index names, all of them of its own directory."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: download it again")
    files = list(weight_map.values())
    # Thousands of tensors lie in a few files, of which each is looked at once.
    if all(isinstance(file_name, str) for file_name in files):
        files = list(dict.fromkeys(files))
    for file_name in files:
        plain = isinstance(file_name, str) and PurePath(file_name).name == file_name
        if not plain or not str(file_name).endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {file_name!r:.200}: only .safetensors files of its own "
                "directory are read"
            )
    return weight_map


def stored_files(source: str | Path) -> TensorFiles | None:
    """Return the tensors beside a config.json, by their headers alone; None where some are missing.

    As on a machine that only plans: nothing can be compared there.
    """
    folder = Path(source)
    folder = folder.parent if folder.is_file() else folder
    return TensorFiles(folder, framework="np") if _has_all_files(folder) else None


def check_stored_sizes(shape: ModelShape, files: TensorFiles) -> None:
    """Raise ValueError where the tensors beside a config.json are of other sizes than it says.

    So that nothing is built, or counted, by sizes that the files do not have.
    """
    stored, said = _stored_sizes(files, shape), _said(shape)
    wrong = [
        f"{name} {said[name]:,} (its tensors {value:,})"
        for name, value in stored.items()
        if said[name] != value
    ]
    if wrong:
        resized = all(name.startswith("vocab_size") for name in wrong)
        cure = " (was its vocabulary resized? then correct vocab_size there)" if resized else ""
        raise ValueError(
            f"{files.directory / 'config.json'} has {', '.join(wrong)}: its tensors and its "
            f"config.json are not of one model{cure}"
        )


def _said(shape: ModelShape) -> dict[str, int]:
    return {
        "num_hidden_layers": shape.num_layers,
        "vocab_size": shape.vocab_size,
        "vocab_size as rows of lm_head": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_experts": shape.num_moe_experts,
        "intermediate_size": shape.ffn_hidden_size,
        "moe_intermediate_size": shape.moe_ffn_hidden_size,
        **(_said_of_latents(shape) if shape.multi_latent_attention else _said_of_heads(shape)),
    }


def _said_of_heads(shape: ModelShape) -> dict[str, int]:
    gates = 2 if shape.attention_output_gate else 1
    return {
        _QUERIES: gates * shape.query_size,
        _KEYS: shape.num_query_groups * shape.kv_channels,
    }


def _said_of_latents(shape: ModelShape) -> dict[str, int]:
    heads, rotary = shape.num_attention_heads, shape.qk_pos_emb_head_dim
    return {
        _LATENT_QUERIES: heads * (shape.qk_head_dim + rotary),
        "q_lora_rank": shape.q_lora_rank,
        "kv_lora_rank + qk_rope_head_dim": shape.kv_lora_rank + rotary,
        _LATENT_KEYS: heads * (shape.qk_head_dim + shape.v_head_dim),
        "kv_lora_rank": shape.kv_lora_rank,
    }


_QUERIES, _KEYS = "num_attention_heads x head_dim", "num_key_value_heads x head_dim"
_LATENT_QUERIES = "num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)"
_LATENT_KEYS = "num_attention_heads x (qk_nope_head_dim + v_head_dim)"
# Each size with a Megatron module of a layer, the number of its tensor there, and the dimension.
_IN_LAYERS = (
    ("intermediate_size", "mlp.linear_fc1", 0, 0),
    ("moe_intermediate_size", "mlp.experts.linear_fc1", 0, 0),
    (_QUERIES, "self_attention.linear_qkv", 0, 0),
    (_KEYS, "self_attention.linear_qkv", 1, 0),
    (_LATENT_QUERIES, "self_attention.linear_q_proj", 0, 0),
    (_LATENT_QUERIES, "self_attention.linear_q_up_proj", 0, 0),
    ("q_lora_rank", "self_attention.linear_q_down_proj", 0, 0),
    ("kv_lora_rank + qk_rope_head_dim", "self_attention.linear_kv_down_proj", 0, 0),
    (_LATENT_KEYS, "self_attention.linear_kv_up_proj", 0, 0),
    ("kv_lora_rank", "self_attention.linear_kv_up_proj", 0, 1),
)


def _stored_sizes(files: TensorFiles, shape: ModelShape) -> dict[str, int]:
    """Return those of `_said` that the tensors tell, each by one tensor that has it."""
    names = names_of(shape.model_type)
    one: dict[str, str] = {}
    layers, experts = {-1}, {-1}
    predicting: set[int] = set()
    for name in files:
        if names.is_beside(name):
            continue
        pattern, numbers = without_numbers(names.as_stored(name))
        one.setdefault(pattern, name)
        if pattern.startswith(names.layer):
            layers.add(numbers[0])
            if pattern.endswith(PREDICTING):
                predicting.add(numbers[0])
            if ".experts.{}." in pattern and len(numbers) > 1:
                experts.add(numbers[1])
            elif pattern.removeprefix(names.layer) in names.stacked:
                experts.add(([*files.shape(name), 0])[0] - 1)
    # Behind the decoder's there may be some that predict one token more.
    found = {"num_hidden_layers": max(layers - predicting) + 1}
    if shape.num_moe_experts:
        found["num_experts"] = max(experts) + 1
    places = [
        ("vocab_size", names.embedding, 0),
        ("vocab_size as rows of lm_head", names.unembedding, 0),
        ("hidden_size", names.embedding, 1),
    ]
    for size, module, number, dimension in _IN_LAYERS:
        stacked = names.modules.get(module, ())
        if number < len(stacked) and stacked[number] not in names.joined:
            places.append((size, names.in_layer(module)[number], dimension))
    for size, module, dimension in places:
        name = one.get(f"{module}.weight")
        if name and len(files.shape(name)) == 2:
            found[size] = files.shape(name)[dimension]
    return {size: value for size, value in found.items() if value}


def _has_all_files(folder: Path) -> bool:
    index = folder / f"{MODEL}.safetensors.index.json"
    if os.path.lexists(folder / f"{MODEL}.safetensors"):
        return True
    return os.path.lexists(index) and all(
        (folder / file).exists() for file in set(read_weight_map(index).values())
    )
