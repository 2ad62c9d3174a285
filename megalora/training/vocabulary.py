"""How many rows of a run's vocabulary are its base's own, and how many Megatron's padding."""

import argparse
from pathlib import Path
from typing import Any, cast

from megatron.core import dist_checkpointing
from megatron.training import get_tokenizer

from megalora.checkpoint.layout import find_directory
from megalora.checkpoint.ranks import on_all_ranks
from megalora.checkpoint.read import read_common
from megalora.model.config_json import load_config, model_shape

_TABLE = "embedding.word_embeddings.weight"


def vocab_size(args: argparse.Namespace, source: str | None) -> int:
    """Return the rows of the vocabulary without Megatron's padding.

    Those of a Hugging Face model are what its config.json says. Else what is largest of the
    tokenizer's, --vocab-size and those of the base checkpoint: a base may have more rows than its
    tokenizer has tokens, and a --vocab-size that is too small is left over from another script.
    source: directory of the base, whose checkpoint has been loaded. All ranks must call it.
    """
    if args.hf_model:
        # Its tensors were held against it when they were loaded.
        return model_shape(load_config(args.hf_model)).vocab_size
    stored = on_all_ranks(lambda: _stored(Path(source)), only=0) if source else 0
    return max(_num_tokens(), args.vocab_size or 0, stored)


def rows_in_softmax(args: argparse.Namespace) -> int:
    """Return the rows that take part in the softmax, once args has the base's `vocab_size`.

    A tokenizer may have more tokens, as an added one that pads: no label may meet a logit that is
    filled, also where its loss is masked.
    """
    return max(_num_tokens(), args.vocab_size)


def _num_tokens() -> int:
    return cast(Any, get_tokenizer()).vocab_size


def _stored(root: Path) -> int:
    """Return the rows that a base checkpoint says are no padding; 0 where it does not say.

    Megatron's training saves its flags. Where there are none, as of `megalora import-base`, nothing
    was padded.
    """
    directory = find_directory(root)
    if not dist_checkpointing.check_is_distributed_checkpoint(str(directory)):
        return 0
    saved = read_common(directory).get("args")
    if saved is not None:
        return getattr(saved, "vocab_size", None) or 0
    table = dist_checkpointing.load_tensors_metadata(str(directory)).get(_TABLE)
    return 0 if table is None else table.global_shape[0]
