"""Chat and text datasets with loss masks and packing; `megalora.data.batch` feeds Megatron."""

from megalora.data.arguments import (
    add_data_args,
    attention_format,
    check_data_args,
    datasets_from_args,
    tokenizer_from_args,
)
from megalora.data.build import build_datasets, check_dataset
from megalora.data.packing import PackedDataset, pack
from megalora.data.tokenizers import ByteTokenizer, encoder_for

__all__ = [
    "ByteTokenizer",
    "PackedDataset",
    "add_data_args",
    "attention_format",
    "build_datasets",
    "check_data_args",
    "check_dataset",
    "datasets_from_args",
    "encoder_for",
    "pack",
    "tokenizer_from_args",
]
