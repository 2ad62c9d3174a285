"""Rollouts on the training model: Megatron's cached inference, with the adapters active.

The oracle is a forward pass of the whole text without a cache, on one rank.
"""

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.utils import InferenceMode
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.utils import get_model_config

from megalora.builder import apply_lora, set_enabled
from megalora.checkpoint.gather import load_adapters
from megalora.policy.policy import Policy
from megalora.policy.sequences import Sequences
from megalora.rollouts.engine import Answer, Sampling
from megalora.rollouts.gap import gap
from megalora.rollouts.megatron import MegatronEngine
from megalora.rollouts.supported import REQUIRED
from tests.dist.support import hf
from tests.dist.support.cases import (
    ALLGATHER,
    EP2,
    ETP2,
    KINDS,
    PP2,
    RECOMPUTED,
    TP2,
    TP2_EP2,
    TP2_SP,
)
from tests.dist.support.layouts import Layout, model_parallel, over, world
from tests.dist.support.models import SEQ_LENGTH, VOCAB_SIZE, build_model
from tests.dist.support.parity import lora_config, start_values
from tests.dist.support.training import Run, Trainer
from tests.dist.test_hf_adapters import shared_directory
from tests.support import hf_models

ONE, DP2 = Layout(), Layout(dp=2)
PROMPTS = [[5, 9, 60], [7], [1, 2, 3, 4, 5], [7], [33, 8, 61, 2], [9, 9, 9]]
SAMPLING = Sampling(max_tokens=6, stop=(3, 17, 40, 41), seed=11)
PADDED = "padded vocabulary"
HYBRID = "hybrid with experts"
# Without Mamba's layers, which cannot be decoded.
PATTERN = {"pattern": "*E|*-"}
CASES = [
    *(
        (ONE, kind)
        for kind in (
            *("tied embeddings", PADDED, "latent attention", "multi-token prediction"),
            *("ungated with biases", "experts", "GLM-4.5's layers", HYBRID),
        )
    ),
    (TP2, "dense"),
    *((TP2_SP, kind) for kind in ("dense", "tied embeddings", PADDED, "latent attention")),
    *((PP2, kind) for kind in ("dense", "multi-token prediction", HYBRID)),
    *((layout, "shared experts") for layout in (TP2_SP, EP2, ETP2, TP2_EP2)),
    (Layout(tp=2, sp=True, pp=2), "dense"),
    (Layout(pp=2, dp=2, ep=2), "experts in 4 layers"),
    (Layout(tp=2, sp=True, dp=2, ep=2, etp=2), "experts"),
]
EVERYWHERE = pytest.mark.parametrize(
    ("layout", "kind"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=world(case[0])) for case in CASES],
)


def prompts_of(dp_rank: int) -> list[list[int]]:
    """Return a data-parallel rank's prompts, longer than those of the rank before."""
    return [[(token + 7 * dp_rank) % 60 for token in prompt] + [1] * dp_rank for prompt in PROMPTS]


def adapted(layout: Layout, kind: str, **fields: Any) -> list[Any]:
    """Build a model whose adapters have a B that is not zero, the same numbers in all layouts."""
    rows = {"vocab_size": VOCAB_SIZE} if kind == PADDED else {}
    pattern = PATTERN if kind == HYBRID else {}
    model = build_model(layout, **{**KINDS[kind].model, **pattern, **fields})
    chunks = apply_lora(model, lora_config(kind), **rows)
    load_adapters(chunks, start_values(chunks))
    return chunks


def forward_logprobs(chunk: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Return the log probabilities of an answer by a forward pass of all of it, [answer, v]."""
    text = torch.tensor([prompt + tokens])
    positions = torch.arange(text.shape[1])[None]
    with torch.no_grad():
        logits = chunk(text, positions, None, runtime_gather_output=True)
    return logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


@dataclasses.dataclass(frozen=True)
class Rank:
    """What a rank of the world has sampled."""

    dp_rank: int
    answers: list[Answer]


def rollout(layout: Layout, kind: str, **fields: Any) -> list[Rank]:
    """Return the answers of each rank of the world."""
    with model_parallel(layout):
        chunks = adapted(layout, kind, **fields)
        dp_rank = parallel_state.get_data_parallel_rank()
        own = MegatronEngine(chunks, max_batch_size=4).generate(prompts_of(dp_rank), SAMPLING)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, Rank(dp_rank, own))
    return ranks


@functools.cache
def truth(world_size: int, kind: str) -> dict[int, list[Answer]]:
    """Return what a rank alone answers as each data-parallel rank, as checked without a cache."""
    one = Layout(dp=world_size)
    ranks = rollout(one, kind)
    with model_parallel(one):
        (chunk,) = adapted(one, kind)
        chunk.eval()
        prompts = prompts_of(dist.get_rank())
        for prompt, answer in zip(prompts, ranks[dist.get_rank()].answers, strict=True):
            tokens = torch.tensor(answer.tokens)[:, None]
            expected = forward_logprobs(chunk, prompt, answer.tokens).gather(-1, tokens)[:, 0]
            assert answer.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    return {rank.dp_rank: rank.answers for rank in ranks}


def check(ranks: list[Rank], expected: dict[int, list[Answer]]) -> None:
    """Compare all ranks' answers, and their log probabilities, with those of one rank."""
    for rank in ranks:
        for own, one in zip(rank.answers, expected[rank.dp_rank], strict=True):
            assert (own.tokens, own.ended) == (one.tokens, one.ended)
            assert own.logprobs == pytest.approx(one.logprobs, abs=1e-5)


@EVERYWHERE
def test_answers_are_those_of_a_model_without_a_cache(layout: Layout, kind: str) -> None:
    check(rollout(layout, kind), truth(layout.world_size, kind))


@over(EP2)
def test_experts_that_gather_all_tokens_answer_alike(layout: Layout) -> None:
    kind = "shared experts"
    check(rollout(layout, kind, **ALLGATHER["fields"]), truth(layout.world_size, kind))


@over(ONE)
def test_an_answer_ends_at_its_first_stop_token_or_at_the_limit(layout: Layout) -> None:
    answers = truth(1, "experts")[0]
    assert {answer.ended for answer in answers} == {False, True}
    for answer in answers:
        stops = [place for place, token in enumerate(answer.tokens) if token in SAMPLING.stop]
        assert stops == ([len(answer.tokens) - 1] if answer.ended else [])
        assert answer.ended or len(answer.tokens) == SAMPLING.max_tokens


@over(ONE)
def test_other_prompts_of_a_batch_do_not_change_an_answer(layout: Layout) -> None:
    with model_parallel(layout):
        engine = MegatronEngine(adapted(layout, "experts"))
        (answer,) = engine.generate(prompts_of(0)[:1], SAMPLING)
        (again,) = engine.generate(prompts_of(0)[:1], dataclasses.replace(SAMPLING, seed=12))
    assert answer.tokens == truth(1, "experts")[0][0].tokens
    assert again.tokens != answer.tokens


@over(ONE)
def test_what_prompts_have_in_common_is_read_once(layout: Layout) -> None:
    alone, sizes = truth(1, "dense")[0], []
    with model_parallel(layout):
        chunks = adapted(layout, "dense")
        chunks[0].embedding.register_forward_hook(lambda *args: sizes.append(args[-1].shape[:2]))
        engine = MegatronEngine(chunks)
        one, other = prompts_of(0)[0], prompts_of(0)[5]
        asked = [one, other, one, one]
        answers = engine.generate(asked, dataclasses.replace(SAMPLING, stop=()))
    assert sizes[:2] == [(3, 2), (1, 4)]
    assert answers[0].tokens[: len(alone[0].tokens)] == alone[0].tokens
    texts = [answer.tokens for answer in answers]
    assert texts[0] != texts[2] != texts[3], "each answer has numbers of its own"
    with model_parallel(layout):
        (chunk,) = adapted(layout, "dense")
        for prompt, answer in zip(asked, answers, strict=True):
            expected = forward_logprobs(chunk.eval(), prompt, answer.tokens)
            tokens = torch.tensor(answer.tokens)[:, None]
            assert answer.logprobs == pytest.approx(
                expected.gather(-1, tokens)[:, 0].tolist(), abs=1e-5
            )


@over(ONE)
def test_tokens_come_as_often_as_the_adapted_model_says(layout: Layout) -> None:
    """Pearson's statistic of 64 tokens exceeds 103 once in a thousand times."""
    number, prompt = 4000, PROMPTS[0]
    with model_parallel(layout):
        chunks = adapted(layout, "dense")
        engine = MegatronEngine(chunks, max_batch_size=number)
        answers = engine.generate([prompt] * number, Sampling(max_tokens=1))
        found = torch.bincount(torch.tensor([a.tokens[0] for a in answers]), minlength=VOCAB_SIZE)
        statistics = []
        for enabled in (True, False):
            set_enabled(chunks, enabled)
            expected = forward_logprobs(chunks[0].eval(), prompt, [0])[0].exp() * number
            statistics.append(float(((found - expected).square() / expected).sum()))
    assert statistics[0] < 103
    assert statistics[1] > 300, "the base says the same"


@over(TP2_SP)
def test_sharp_logits_give_what_transformers_generates(layout: Layout) -> None:
    directory, model = shared_directory(), hf_models.hf_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(3e4)  # type: ignore[union-attr]
    if dist.get_rank() == 0:
        model.save_pretrained(directory)
    dist.barrier()
    with model_parallel(layout):
        engine = MegatronEngine(hf.load(layout, directory), vocab_size=hf_models.VOCAB)
        prompts = prompts_of(1)
        answers = engine.generate(prompts, Sampling(max_tokens=6))
    for prompt, answer in zip(prompts, answers, strict=True):
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        text = model.generate(torch.tensor([prompt]), **how)  # type: ignore[operator]
        assert text[0, len(prompt) :].tolist() == answer.tokens


@over(ONE)
def test_padding_that_takes_part_in_the_softmax_is_left_out_here(layout: Layout) -> None:
    with model_parallel(layout):
        model = build_model(layout, **KINDS[PADDED].model)
        chunks = apply_lora(model, lora_config(PADDED))
        load_adapters(chunks, start_values(chunks))
        engine = MegatronEngine(chunks, vocab_size=VOCAB_SIZE)
        answers = engine.generate(prompts_of(0), SAMPLING)
    check([Rank(0, answers)], truth(1, PADDED))


@over(EP2)
def test_the_policy_that_learns_finds_no_gap(layout: Layout) -> None:
    with model_parallel(layout):
        trainer = Trainer(adapted(layout, "shared experts"), layout, Run())
        prompts = prompts_of(parallel_state.get_data_parallel_rank())
        answers = MegatronEngine(trainer.models).generate(prompts, SAMPLING)
        sequences = Sequences.of(prompts, [answer.tokens for answer in answers])
        policy = Policy(trainer.models, trainer.optimizer, None)  # type: ignore[arg-type]
        gaps = []
        for enabled in (True, False):
            set_enabled(trainer.models, enabled)
            (found,) = policy.logprobs([sequences])
            learner = [own[mask] for own, mask in zip(found, sequences.answers, strict=True)]
            gaps.append(gap(learner, answers, group=parallel_state.get_data_parallel_group()))
    assert gaps[0].largest < 1e-5
    assert gaps[1].mean > 0.1
    assert gaps[1].kl > 0.01
    everywhere: list[Any] = [None, None]
    dist.all_gather_object(everywhere, gaps)
    assert everywhere[0] == everywhere[1]


@over(TP2_SP, PP2)
def test_half_precision_is_sampled_through_its_wrappers(layout: Layout) -> None:
    """A 32nd: what bf16 rounds a logit of 4 to 8 by."""
    half = {"bf16": True, "params_dtype": torch.bfloat16}
    with model_parallel(layout):
        (chunk,) = adapted(layout, "dense", **half)
        answers = MegatronEngine(Trainer([chunk], layout, Run()).models).generate(
            prompts_of(0), SAMPLING
        )
    with model_parallel(Layout(dp=layout.world_size)):
        (chunk,) = adapted(Layout(dp=layout.world_size), "dense", **half)
        for prompt, answer in zip(prompts_of(0), answers, strict=True):
            tokens = torch.tensor(answer.tokens)[:, None]
            expected = forward_logprobs(chunk.eval(), prompt, answer.tokens).gather(-1, tokens)
            assert answer.logprobs == pytest.approx(expected[:, 0].tolist(), abs=1 / 32)


# === Training goes on as if nothing had been sampled ===

DROPPED = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
TRAINED = {
    ONE: ("dense", RECOMPUTED["fields"], Run()),
    TP2_SP: ("latent attention", RECOMPUTED["fields"], Run()),
    PP2: ("dense", {}, Run()),
    EP2: ("shared experts", {}, Run(distributed_optimizer=True, overlap=True)),
}


def trained(layout: Layout, *, sample: bool) -> list[Any]:
    """Take two steps, with answers sampled before each or not; return all that there is then."""
    kind, fields, run = TRAINED[layout]
    found: list[Any] = []
    with model_parallel(layout):
        model = build_model(layout, **{**KINDS[kind].model, **fields, **DROPPED})
        chunks = apply_lora(model, lora_config(kind, dropout=0.1))
        load_adapters(chunks, start_values(chunks))
        trainer = Trainer([chunk.train() for chunk in chunks], layout, run)
        if run.overlap:
            get_model_config(chunks[0]).no_sync_func = trainer.models[0].no_sync
        # As long as what is trained, with which it shares a table of rotary angles.
        sampling = Sampling(max_tokens=SEQ_LENGTH - 4 - layout.dp)
        prompts = prompts_of(parallel_state.get_data_parallel_rank())
        for step in range(2):
            if sample:
                MegatronEngine(trainer.models).generate(prompts, sampling)
            found += [random_states(), flags(chunks[0]), trainer.step(step)]
        if run.overlap:
            trainer.models[0].start_param_sync(force_sync=True)
        return [*found, random_states(), [p.detach().clone() for p in chunks[0].parameters()]]


def random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *get_cuda_rng_tracker().get_states().values()]


def flags(chunk: Any) -> list[Any]:
    """Return the switches of all modules and their configurations."""
    switches = [InferenceMode.is_active(), getattr(chunk.decoder.input_tensor, "shape", None)]
    for module in chunk.modules():
        names = [name for name, value in vars(module).items() if isinstance(value, bool)]
        switches.append({name: getattr(module, name) for name in names})
        if hasattr(module, "config"):
            switches.append({k: v for k, v in vars(module.config).items() if isinstance(v, bool)})
    return switches


@over(*TRAINED)
def test_training_goes_on_bit_for_bit(layout: Layout) -> None:
    plain, sampled = (trained(layout, sample=sample) for sample in (False, True))
    for one, other in zip(plain, sampled, strict=True):
        if isinstance(one, list) and isinstance(one[0], torch.Tensor):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        else:
            assert one == other


# === What cannot be ===


@over(ONE)
@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("sliding window", r"window_size is .*: rollouts by Megatron cannot have it"),
        ("hybrid", r"hybrid_layer_pattern is .*, with layers M: "),
        ("sparse absorbed attention", "experimental_attention_variant is dsa: "),
    ],
)
def test_layers_that_it_cannot_decode_are_refused(layout: Layout, kind: str, sentence: str) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS[kind].model)
        with pytest.raises(ValueError, match=sentence):
            MegatronEngine(chunks)


@over(Layout(cp=2))
def test_context_parallelism_is_refused(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS["dense"].model)
        with pytest.raises(ValueError, match=r"context_parallel_size is 2: .* set it to 1"):
            MegatronEngine(chunks)


@over(Layout(pp=2, vpp=2))
def test_interleaved_pipelines_are_refused(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS["dense of 4 layers"].model)
        with pytest.raises(ValueError, match="a rank has 2 model chunks"):
            MegatronEngine(chunks)


@over(ONE)
def test_megatron_has_all_flags_that_are_refused(layout: Layout) -> None:
    assert {field for field, _, _ in REQUIRED} <= set(MLATransformerConfig.__dataclass_fields__)


@pytest.mark.bad_input("a rank that fails alone")
@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ([], "prompt 1 is empty"),
        ([1, 64], "prompt 1 has token 64, outside of the vocabulary of 64"),
        ([1] * 11, "prompt 1 has 11 tokens, with max_tokens 6 more than max_sequence_length 16"),
        (None, r"ranks have prompts \[2, 1\]"),
    ],
)
@over(DP2)
def test_what_one_rank_cannot_answer_is_said_on_all(
    layout: Layout, prompt: list[int] | None, sentence: str
) -> None:
    with model_parallel(layout):
        engine = MegatronEngine(adapted(layout, "dense"))
        own = [[1]] if prompt is None else [[1], prompt]
        with pytest.raises(ValueError, match=sentence):
            engine.generate(own if dist.get_rank() else [[1], [2]], SAMPLING)


@pytest.mark.bad_input("a rank that disagrees")
@pytest.mark.parametrize(
    ("layout", "last", "max_tokens", "sentence"),
    [
        pytest.param(TP2_SP, 2, 6, "different prompts or sampling", marks=world(TP2_SP)),
        pytest.param(DP2, 1, 5, r"ranks have max_tokens \[6, 5\]", marks=world(DP2)),
    ],
)
def test_ranks_that_disagree_are_told(
    layout: Layout, last: int, max_tokens: int, sentence: str
) -> None:
    with model_parallel(layout):
        engine = MegatronEngine(adapted(layout, "dense"))
        rank = dist.get_rank()
        sampling = dataclasses.replace(SAMPLING, max_tokens=max_tokens if rank else 6)
        with pytest.raises(ValueError, match=sentence):
            engine.generate([[5, last if rank else 1]], sampling)


@pytest.mark.bad_input("a number that is not one")
@over(ONE)
def test_logits_that_overflow_are_no_answers(layout: Layout) -> None:
    with model_parallel(layout):
        (chunk,) = adapted(layout, "dense")
        chunk.decoder.final_layernorm.weight.data.fill_(float("inf"))
        with pytest.raises(ValueError, match="log probabilities that are not finite"):
            MegatronEngine([chunk]).generate(PROMPTS, SAMPLING)
