"""Megatron's own --data-path datasets, with samples as `megalora.data.batch` takes them."""

import argparse
import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training.utils import get_blend_and_blend_per_split
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from megatron.core.tokenizers.text import MegatronTokenizerText


class Samples(Protocol):
    """A dataset of Megatron's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]: ...


class IndexedDataset(Dataset):
    """A dataset of Megatron's, its samples completed by the keys that ours have."""

    def __init__(self, dataset: Samples, eod: int, *, keep_apart: bool) -> None:
        """Complete `dataset`; `keep_apart` ends an example behind every `eod` token."""
        self.dataset = dataset
        self.eod = eod
        self.keep_apart = keep_apart
        self.split = getattr(dataset, "split", None) or getattr(dataset, "index_split", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.dataset[index]
        tokens = sample["tokens"]
        cu_seqlens = torch.full((len(tokens) + 1,), len(tokens), dtype=torch.int32)
        cu_seqlens[0] = 0
        if self.keep_apart:
            ends = (tokens == self.eod).nonzero().view(-1) + 1
            cu_seqlens[1 : 1 + len(ends)] = ends
        padding_mask = torch.zeros_like(tokens, dtype=torch.bool)
        return {**sample, "padding_mask": padding_mask, "cu_seqlens": cu_seqlens}


def indexed_datasets(
    args: argparse.Namespace,
    tokenizer: "MegatronTokenizerText",
    num_samples: Sequence[int | None],
    is_read: bool,
) -> list[IndexedDataset | None]:
    """Return the train, validation and test datasets of --data-path or --mock-data.

    Every rank must call this, the ranks wait for each other; without `is_read` it returns nothing.
    Raises ValueError where a file of their cache is a pickle, which can run code.
    """
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    kind: Any = MockGPTDataset if args.mock_data else GPTDataset
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        # The mask is made on the device, from `cu_seqlens`.
        reset_attention_mask=False,
        create_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
    )
    keep_apart = args.reset_attention_mask
    return [
        None if dataset is None else IndexedDataset(dataset, tokenizer.eod, keep_apart=keep_apart)
        for dataset in _built(kind, list(num_samples), lambda: is_read, config)
    ]


def _built(*blend: object) -> Sequence[Any]:
    builder: Any = BlendedMegatronDatasetBuilder
    try:
        return builder(*blend).build()
    except pickle.UnpicklingError as error:
        raise ValueError(f"data_cache_path is not usable: {error}: remove the cache") from error
