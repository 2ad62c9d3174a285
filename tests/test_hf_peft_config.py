"""Rules of a PEFT configuration: which modules it names, with which rank and alpha."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from megalora.hf.peft_config import PeftRules, choose_patterns, most_common, target_modules

NAMES = [
    f"model.layers.{layer}.{leaf}"
    for layer in range(3)
    for leaf in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "mlp.gate_proj",
        "mlp.shared_expert.gate_proj",
    )
] + ["lm_head"]
VALUES = st.tuples(st.integers(1, 3), st.sampled_from([1.0, 2.0, 0.5]))


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1),
    st.randoms(use_true_random=False),
)
def test_patterns_say_every_rank_and_alpha_in_any_order(wanted, shuffle: random.Random):
    default = most_common(wanted.values())
    ranks, alphas = choose_patterns(wanted, default)
    for patterns in (ranks, alphas):
        items = list(patterns.items())
        shuffle.shuffle(items)
        patterns.clear()
        patterns.update(items)
    rules = PeftRules(r=default[0], lora_alpha=default[1], rank_pattern=ranks, alpha_pattern=alphas)
    for name, (rank, alpha) in wanted.items():
        assert rules.rank(name) == rank
        assert rules.scale(name) == pytest.approx(alpha / rank)


DENSE_NAMES = [name for name in NAMES if "shared_expert" not in name]


@settings(max_examples=100, deadline=None)
@given(st.sets(st.sampled_from(DENSE_NAMES), min_size=1))
def test_target_modules_select_what_has_an_adapter_and_nothing_else(names):
    targets = target_modules(sorted(names), lambda _place: 3)
    selected = {n for n in DENSE_NAMES if any(n == t or n.endswith("." + t) for t in targets)}
    assert selected == names


PARTS = st.sampled_from(
    [
        "q_proj",
        "k_proj",
        r"self_attn\.q_proj",
        r"layers\.1\.",
        ".*",
        "_proj",
        "q",
        r"[qk]_proj",
        "1",
    ]
)
PATTERNS = st.lists(PARTS, min_size=1, max_size=2).map("".join)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(PATTERNS, st.integers(2, 9), max_size=4), st.sampled_from(NAMES))
def test_any_pattern_means_what_it_means_to_peft(patterns, name):
    rules = PeftRules(r=1, lora_alpha=1, rank_pattern=patterns)
    assert rules.rank(name) == patterns.get(get_pattern_key(patterns.keys(), name), 1)
