"""What an export has to know of a run's base: the rows of its vocabulary above all.

Megatron pads them. What is padding takes no part in the softmax, and is in no export.
"""

import argparse
from pathlib import Path
from typing import Any, cast

from megatron.core import dist_checkpointing
from megatron.training import get_tokenizer

from megalora.checkpoint.description import HUGGING_FACE, read_sizes
from megalora.checkpoint.layout import find_directory
from megalora.checkpoint.ranks import on_all_ranks
from megalora.checkpoint.read import read_common
from megalora.model.config_json import load_config, model_shape

_TABLE = "embedding.word_embeddings.weight"


def base_sizes(args: argparse.Namespace, source: str | None) -> dict[str, Any]:
    """Return a base's `vocab_size`, without Megatron's padding, and `model_type` where known.

    Those of a Hugging Face model are what its config.json says, also where `megalora import-base`
    made a checkpoint of it. Else the rows are what is largest of the tokenizer's, --vocab-size and
    those of the base checkpoint: a base may have more rows than its tokenizer has tokens, and a
    --vocab-size that is too small is left over from another script.
    source: directory of the base, whose checkpoint has been loaded. All ranks must call it.
    """
    if args.hf_model:
        # Its tensors were held against it when they were loaded.
        shape = model_shape(load_config(args.hf_model))
        return {"vocab_size": shape.vocab_size, "model_type": shape.model_type}
    stored = on_all_ranks(lambda: _stored(Path(source)), only=0) if source else {}
    if "model_type" in stored:
        return stored
    rows = stored.get("vocab_size", 0)
    return {"vocab_size": max(_num_tokens(), args.vocab_size or 0, rows)}


def vocab_size(args: argparse.Namespace, source: str | None) -> int:
    """Return the rows of the vocabulary without Megatron's padding; see `base_sizes`."""
    return base_sizes(args, source)["vocab_size"]


def rows_in_softmax(args: argparse.Namespace) -> int:
    """Return the rows that take part in the softmax, once args has the base's `vocab_size`.

    A tokenizer may have more tokens, as an added one that pads: no label may meet a logit that is
    filled, also where its loss is masked.
    """
    return max(_num_tokens(), args.vocab_size)


def _num_tokens() -> int:
    return cast(Any, get_tokenizer()).vocab_size


def _stored(root: Path) -> dict[str, Any]:
    """Return what a base checkpoint says of its model: `vocab_size`, and what `base_sizes` adds.

    Megatron's training saves its flags. Where there are none, as of an older `megalora
    import-base`, nothing was padded.
    """
    directory = find_directory(root)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        return {}
    common = read_common(directory)
    if HUGGING_FACE in common:
        return read_sizes(common)
    saved = common.get("args")
    if saved is not None:
        return {"vocab_size": getattr(saved, "vocab_size", None) or 0}
    table = dist_checkpointing.load_tensors_metadata(str(directory)).get(_TABLE)
    return {} if table is None else {"vocab_size": table.global_shape[0]}
