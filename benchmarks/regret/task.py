"""A language that can be learned but not guessed: every pair of tokens fixes the next one.

The rules are a random table [V, V] -> V: 4,096 facts of 6 bits. Pretraining learns one table;
fine-tuning learns one of which a part of the entries has changed, so that it must store facts.
"""

import torch
from torch import Tensor

VOCAB_SIZE = 64
SEQ_LENGTH = 48
# Share of tokens that follow the rules; the others are uniform.
REGULARITY = 0.9
BASE_SEED, CHANGED_SEED, RIVAL_SEED = 1, 2, 3
# Half of the entries change.
CHANGED_SHARE = 0.5


def base_table() -> Tensor:
    """Return the rules of pretraining, [V, V]."""
    generator = torch.Generator().manual_seed(BASE_SEED)
    return torch.randint(0, VOCAB_SIZE, (VOCAB_SIZE, VOCAB_SIZE), generator=generator)


def changed_table() -> Tensor:
    """Return the rules of fine-tuning: about half of the entries are those of pretraining."""
    generator = torch.Generator().manual_seed(CHANGED_SEED)
    new = torch.randint(0, VOCAB_SIZE, (VOCAB_SIZE, VOCAB_SIZE), generator=generator)
    changed = torch.rand(VOCAB_SIZE, VOCAB_SIZE, generator=generator) < CHANGED_SHARE
    return torch.where(changed, new, base_table())


def rival_table() -> Tensor:
    """Return rules that have nothing in common with pretraining's but chance."""
    generator = torch.Generator().manual_seed(RIVAL_SEED)
    return torch.randint(0, VOCAB_SIZE, (VOCAB_SIZE, VOCAB_SIZE), generator=generator)


def halved_tables() -> list[Tensor]:
    """Return two languages that can be told apart: each has its own half of the vocabulary."""
    half = VOCAB_SIZE // 2
    return [base_table() % half, rival_table() % half + half]


def sequences(tables: list[Tensor], num: int, generator: torch.Generator) -> Tensor:
    """Draw [num, SEQ_LENGTH + 1] tokens; each follows one of the tables, chosen anew by chance."""
    shape = (num, SEQ_LENGTH + 1)
    tokens = torch.randint(0, VOCAB_SIZE, shape, generator=generator)
    regular = torch.rand(shape, generator=generator) < REGULARITY
    chosen = torch.randint(0, len(tables), shape, generator=generator)
    rules = torch.stack(tables)
    for t in range(2, shape[1]):
        ruled = rules[chosen[:, t], tokens[:, t - 2], tokens[:, t - 1]]
        tokens[:, t] = torch.where(regular[:, t], ruled, tokens[:, t])
    return tokens
