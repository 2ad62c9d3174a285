"""Megatron's padding of the vocabulary takes no part in the softmax, whatever makes the loss.

The oracle is transformers' own model, whose vocabulary of 262 rows nothing pads, in plain torch.
"""

import dataclasses
import functools
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.models.common.language_module import language_module
from torch import Tensor
from torch.nn.functional import cross_entropy

from megalora.builder import apply_lora, named_adapters
from megalora.checkpoint.gather import gather_adapters, load_adapters
from megalora.config import LoRAConfig
from megalora.hf.adapters import from_hf, to_hf
from megalora.hf.factors import LoRAFactors
from megalora.model.config_json import model_shape, read_config
from tests.dist.support import hf
from tests.dist.support.cases import KINDS
from tests.dist.support.layouts import Layout, model_parallel, over
from tests.dist.support.models import SEQ_LENGTH, VOCAB_SIZE, build_model
from tests.dist.support.parity import lora_config
from tests.dist.test_hf_adapters import shared_directory
from tests.support import hf_models

VOCAB, NUM_STEPS, LR, EPS = 262, 5, 1e-2, 1e-5
CONFIG = LoRAConfig(rank=4, alpha=8.0)
TOKENS = torch.randint(VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
IDS, LABELS = TOKENS[:, :-1], TOKENS[:, 1:]
POSITIONS = torch.arange(16).expand(2, -1)
ONE, TP2, TP4 = Layout(), Layout(tp=2, sp=True), Layout(tp=4)
# What --make-vocab-size-divisible-by says. At TP 4, the last rank then has padding alone.
MULTIPLES = (8, 128)
LOSSES = {
    "vocab-parallel": {},
    "native": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"},
    "te": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
}
Factors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Of transformers' model: logits of the base; losses [b, s] and gradients of the first step."""

    directory: Path
    base_losses: Tensor
    start: dict[str, LoRAFactors]
    losses: Tensor
    gradients: Factors
    end: Factors


@functools.cache
def oracle(*, rounded: bool) -> Oracle:
    """Train transformers' model; rounded: the gradient of its logits, to bf16, as `native` does."""
    model, directory = hf_models.hf_model("llama", vocab_size=VOCAB), shared_directory()
    model.save_pretrained(directory)
    dist.barrier()
    start = hf_models.random_factors(model, {"": (CONFIG.rank, CONFIG.scale(CONFIG.rank))})
    factors = {name: x.clone().requires_grad_() for name, x in flat(start).items()}
    optimizer = torch.optim.Adam(factors.values(), lr=LR, eps=EPS)
    steps, gradients = [], {}
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        steps.append(hf_losses(model, factors, rounded))
        steps[-1].mean().backward()
        gradients = gradients or {name: x.grad.clone() for name, x in factors.items()}  # type: ignore[union-attr]
        optimizer.step()
    end = {name: x.detach() for name, x in factors.items()}
    base = cross_entropy(hf_models.logits(model, IDS).mT, LABELS, reduction="none")
    return Oracle(directory, base, start, steps[0].detach(), gradients, end)


def hf_losses(model: torch.nn.Module, factors: Factors, rounded: bool) -> Tensor:
    """Return the loss of each token [b, s], differentiable in the factors."""
    weights = {}
    for name, weight in model.named_parameters():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in factors:
            update = factors[f"{module}.lora_B"] @ factors[f"{module}.lora_A"]
            weights[name] = weight.detach() + CONFIG.scale(CONFIG.rank) * update
    logits = torch.func.functional_call(model, weights, (IDS,)).logits
    if rounded:
        logits.register_hook(lambda gradient: gradient.bfloat16().float())
    return cross_entropy(logits.mT, LABELS, reduction="none")


def flat(factors: dict[str, LoRAFactors]) -> Factors:
    """Name every tensor of Hugging Face's adapters."""
    return {
        f"{name}.{end}": getattr(module, end)
        for name, module in factors.items()
        for end in ("lora_A", "lora_B")
    }


def load(layout: Layout, truth: Oracle, multiple: int, **fields: Any) -> list[Any]:
    """Build the padded model of the oracle's directory."""
    multiple *= layout.tp
    rows = -(-VOCAB // multiple) * multiple
    return hf.load(layout, truth.directory, padded_vocab=rows, **fields)


def adapted(layout: Layout, truth: Oracle, multiple: int, **fields: Any) -> list[Any]:
    """Build it with the adapters that the oracle starts from."""
    chunks = apply_lora(load(layout, truth, multiple, **fields), CONFIG, vocab_size=VOCAB)
    shape, rows = model_shape(read_config(truth.directory)), chunks[0].vocab_size
    load_adapters(chunks, from_hf(truth.start, CONFIG, shape, padded_vocab_size=rows))
    return chunks


def exported(chunks: list[Any], truth: Oracle) -> Factors:
    """Return what an export has, on rank 0; the padding is trimmed."""
    gathered = gather_adapters(chunks)
    shape = model_shape(read_config(truth.directory))
    return flat(to_hf(gathered, CONFIG, shape)) if dist.get_rank() == 0 else {}


def own_padding(chunk: Any, vocab_size: int = VOCAB) -> int:
    """Return this rank's first row of padding."""
    rows = chunk.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
    return max(0, vocab_size - rows * parallel_state.get_tensor_model_parallel_rank())


def close(found: Factors, expected: Factors, tolerance: float) -> None:
    """Compare each tensor by its own largest number."""
    for name, value in expected.items() if dist.get_rank() == 0 else ():
        error = (found[name] - value).abs().max() / value.abs().max()
        assert error < tolerance, f"{name} is {error:.1e} off"


def te_cross_entropy(logits: Tensor, labels: Tensor, group: Any, *_more: object) -> Tensor:
    """Stand in for TransformerEngine's kernels: each rank's maximum and sum are put together."""
    x, first = logits.float(), group.rank() * logits.shape[-1]
    largest = x.detach().max(-1).values
    here = (labels >= first) & (labels < first + x.shape[-1])
    at_label = x.gather(-1, torch.where(here, labels - first, 0)[..., None])[..., 0]
    own = torch.stack(
        [
            largest,
            (x.detach() - largest[..., None]).exp().sum(-1),
            torch.where(here, at_label.detach(), float("-inf")),
        ]
    )
    ranks = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(ranks, own, group=group)
    maxima, sums, targets = torch.stack(ranks).unbind(1)
    whole = maxima.max(0).values
    total = (sums * (maxima - whole).exp()).sum(0)
    loss = total.log() + whole - targets.max(0).values
    # Its gradient alone: softmax - 1 at the label.
    softmax = (x.detach() - whole[..., None]).exp() / total[..., None]
    surrogate = (softmax * x).sum(-1) - torch.where(here, at_label, 0.0)
    return loss + surrogate - surrogate.detach()


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_module, "te_parallel_cross_entropy", te_cross_entropy)


@pytest.mark.parametrize("multiple", MULTIPLES)
@over(ONE, TP2, TP4)
def test_the_first_loss_is_that_of_transformers(layout: Layout, multiple: int) -> None:
    truth = oracle(rounded=False)
    with model_parallel(layout), torch.no_grad():
        padded = load(layout, truth, multiple)[0](IDS, POSITIONS, None, labels=LABELS)
        (chunk,) = apply_lora(load(layout, truth, multiple), CONFIG, vocab_size=VOCAB)
        losses = chunk(IDS, POSITIONS, None, labels=LABELS)
    torch.testing.assert_close(losses, truth.base_losses, atol=1e-5, rtol=1e-5)
    assert (padded - truth.base_losses).abs().max() > 1e-3, "padding changes nothing here"


@pytest.mark.parametrize(
    ("multiple", "loss"),
    [*((m, "vocab-parallel") for m in MULTIPLES), (128, "native"), (128, "te")],
)
@over(ONE, TP2, TP4)
def test_five_steps_are_those_of_the_unpadded_model(
    layout: Layout, multiple: int, loss: str
) -> None:
    truth = oracle(rounded=loss == "native")
    with model_parallel(layout):
        chunks = adapted(layout, truth, multiple, **LOSSES[loss])
        parameters = [p for p in chunks[0].parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=LR, eps=EPS)
        for number in range(NUM_STEPS):
            optimizer.zero_grad()
            losses = chunks[0](IDS, POSITIONS, None, labels=LABELS)
            losses.mean().backward()
            if number == 0:
                torch.testing.assert_close(losses, truth.losses, atol=1e-5, rtol=1e-5)
                close(gradients(chunks, parameters, truth), truth.gradients, 1e-4)
            optimizer.step()
        found = exported(chunks, truth)
        last = chunks[0].output_layer_lora.lora_B[own_padding(chunks[0]) :]
    close(found, truth.end, 1e-4)
    assert not last.any(), "rows of padding have learned"


def gradients(chunks: list[Any], parameters: list[Any], truth: Oracle) -> Factors:
    """Return every gradient as an export names it; the padding has none at all."""
    assert not chunks[0].output_layer_lora.lora_B.grad[own_padding(chunks[0]) :].any()
    values = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.grad
    try:
        return exported(chunks, truth)
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


@pytest.mark.parametrize("loss", LOSSES)
@over(ONE, TP4)
def test_half_precision_stays_finite(layout: Layout, loss: str) -> None:
    truth = oracle(rounded=False)
    with model_parallel(layout):
        half = {"bf16": True, "params_dtype": torch.bfloat16, **LOSSES[loss]}
        (chunk,) = adapted(layout, truth, 128, **half)
        losses = chunk(IDS, POSITIONS, None, labels=LABELS)
        losses.float().mean().backward()
    torch.testing.assert_close(losses.float(), truth.losses, atol=0.2, rtol=0.05)
    grads = [adapter.lora_B.grad for _, adapter in named_adapters([chunk])]
    assert all(grad.isfinite().all() for grad in grads)


@over(ONE, TP2)
def test_no_padded_token_can_be_sampled(layout: Layout) -> None:
    truth = oracle(rounded=False)
    with model_parallel(layout), torch.no_grad():
        (chunk,) = adapted(layout, truth, 128)
        for gather in (False, True):
            logits = chunk(IDS, POSITIONS, None, runtime_gather_output=gather)
            first = VOCAB if gather else own_padding(chunk)
            assert (logits[..., first:] == torch.finfo(torch.float32).min).all()
            assert (logits[..., :first].abs() < 100).all()


@pytest.mark.parametrize(
    ("kind", "init"),
    [
        *(("multi-token prediction", "uniform"), ("hybrid", "uniform")),
        *(("tied embeddings", "uniform"), ("unembedding alone", "pissa")),
    ],
)
@over(ONE, TP2)
def test_what_is_in_the_padding_changes_nothing(layout: Layout, kind: str, init: str) -> None:
    found = []
    with model_parallel(layout):
        for value in (0.0, 3.0):
            chunks = build_model(layout, vocab_size=96, **KINDS[kind].model)
            is_tied = KINDS[kind].model.get("tied")
            table = chunks[0].embedding.word_embeddings if is_tied else chunks[0].output_layer
            table.weight.data[own_padding(chunks[0], VOCAB_SIZE) :] = value
            apply_lora(chunks, lora_config(kind, init=init), vocab_size=VOCAB_SIZE)
            found.append(run(chunks[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def run(chunk: Any) -> list[Tensor]:
    """Return the loss of every token, and every factor with its gradient."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB_SIZE, (2, SEQ_LENGTH + 1), generator=generator)
    factors = [p for _, adapter in named_adapters([chunk]) for p in adapter.parameters()]
    for _, adapter in named_adapters([chunk]):
        if adapter.config.init == "uniform":
            torch.nn.init.constant_(adapter.lora_B, 0.01)
    positions = torch.arange(SEQ_LENGTH).expand(2, -1)
    losses = chunk(tokens[:, :-1], positions, None, labels=tokens[:, 1:])
    losses.mean().backward()
    return [losses.detach(), *(p.detach() for p in factors), *(p.grad for p in factors)]


@over(ONE)
def test_a_vocabulary_without_rows_is_refused(layout: Layout) -> None:
    with model_parallel(layout):
        chunks = build_model(layout, **KINDS["dense"].model)
        with pytest.raises(ValueError, match="vocab_size is 0: give how many rows are tokens"):
            apply_lora(chunks, lora_config("dense"), vocab_size=0)


@over(ONE)
def test_these_are_all_of_megatrons_losses(layout: Layout) -> None:
    kinds = typing.get_type_hints(ModelParallelConfig)["cross_entropy_fusion_impl"]
    assert set(typing.get_args(kinds)) == {"native", "te"}
