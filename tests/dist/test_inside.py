"""What a layout logs of its adapters is what torch.linalg says of the unsharded matrices."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.linalg import matrix_norm

from megalora.builder import apply_lora
from megalora.checkpoint.gather import load_adapters
from megalora.policy.policy import gather_parameters
from megalora.training.inside import COLUMNS, LARGEST, Inside, Run, kind_of
from tests.dist.support import cases
from tests.dist.support.cases import CP2, DP2, EP2, EP2_ETP2, ETP2, KINDS, TP2, TP2_SP, Case
from tests.dist.support.layouts import Layout, model_parallel, one_rank, world
from tests.dist.support.models import build_model
from tests.dist.support.oracle import Tensors, projections
from tests.dist.support.parity import ALPHA, assemble, lora_config, start_values
from tests.dist.support.training import Trainer

LR, RTOL = 3e-2, 1e-5
CASES = [
    Case(layout=TP2_SP),
    Case(layout=TP2, kind="tied embeddings"),
    Case(layout=TP2, kind="latent attention, joint down projection"),
    Case(layout=TP2, kind="gated delta nets, gates too"),
    Case(layout=CP2, kind="shared A"),
    Case(layout=DP2, **cases.OVERLAPPED),
    Case(layout=Layout(pp=2, vpp=2), kind="dense of 4 layers"),
    Case(layout=EP2, kind="experts"),
    Case(layout=ETP2, kind="shared-outer experts"),
    # Its stages have no kind of module in common but those of attention.
    Case(layout=Layout(tp=2, sp=True, pp=2, ep=2), kind="GLM-4.5's layers"),
    Case(layout=EP2_ETP2, kind="shared-outer experts"),
]


def over_cases(chosen: list[Case]) -> pytest.MarkDecorator:
    marked = [pytest.param(case, id=str(case), marks=world(case.layout)) for case in chosen]
    return pytest.mark.parametrize("case", marked)


def dense(case: Case, factors: Tensors) -> dict[str, float]:
    """Return what is to be logged, by torch.linalg from whole A, B and W."""
    found: dict[str, list[dict[str, float]]] = {}
    with model_parallel(one_rank(case.layout)):
        (base,) = build_model(one_rank(case.layout), **KINDS[case.kind].model)
        weights = dict(base.named_parameters())
        for key in factors:
            name, _, factor = key.partition("_lora.")
            if factor == "lora_A":
                own = matrices(name, factors, weights, base.config)
                found.setdefault(kind_of(name), []).extend(own)
    found["all"] = [each for of_kind in found.values() for each in of_kind]
    means = {
        f"{column}/{kind}": sum(each[column] for each in own) / len(own)
        for kind, own in found.items()
        for column in COLUMNS
    }
    most = {f"{LARGEST}/{kind}": max(each["update"] for each in own) for kind, own in found.items()}
    return {**means, **most}


def matrices(
    name: str, factors: Tensors, weights: dict[str, Any], config: Any
) -> list[dict[str, float]]:
    """Return the numbers of each matrix of an adapter."""
    a, b = (factors[f"{name}_lora.{factor}"].double() for factor in ("lora_A", "lora_B"))
    rank, found = b.shape[-1], []
    for expert, weight in enumerate(weights_of(name, weights)):
        own_a, own_b = (f[expert] if f.dim() == 3 else f for f in (a, b))
        every = own_a.unflatten(0, (-1, rank))
        numbers = torch.zeros(len(own_b), dtype=torch.int64)
        if len(every) > 1:
            numbers = torch.tensor(projections(name.rpartition(".")[2], len(own_b), config))
        for number, of_a in enumerate(every):
            rows = numbers == number
            below = weight[: len(rows)][rows].double()
            found.append(numbers_of(of_a, own_b[rows], below))
    return found


def weights_of(name: str, weights: dict[str, Any]) -> list[Tensor]:
    """Return the whole weights below an adapter, of each expert."""
    if ".experts." not in f"{name}.":
        tied = "embedding.word_embeddings.weight"
        return [weights.get(f"{name}.weight", weights[tied]).detach()]
    parent, _, leaf = name.rpartition(".")
    count = sum(key.startswith(parent) and key.endswith(f"{leaf}.weight") for key in weights)
    each = (f"{parent}.local_experts.{expert}.{leaf}.weight" for expert in range(count))
    return [weights[key].detach() for key in each]


def numbers_of(a: Tensor, b: Tensor, weight: Tensor) -> dict[str, float]:
    """Return the numbers of one matrix; alpha is that of any rank."""
    update, init = ALPHA / len(a) * b @ a, 1 / math.sqrt(a.shape[1])
    values = (
        *(matrix_norm(a), matrix_norm(b), matrix_norm(a, 2), matrix_norm(b, 2)),
        matrix_norm(b, 2) > matrix_norm(a, 2),
        matrix_norm(update) / matrix_norm(weight),
        matrix_norm(update, 2) / matrix_norm(weight),
        *(ALPHA * init * LR, init / LR),
    )
    return {column: float(value) for column, value in zip(COLUMNS, values, strict=True)}


@over_cases(CASES)
def test_each_layout_logs_the_numbers_of_the_unsharded_matrices(case: Case) -> None:
    model, config = KINDS[case.kind].model, lora_config(case.kind)
    with model_parallel(case.layout):
        chunks = apply_lora(build_model(case.layout, **model), config)
        load_adapters(chunks, start_values(chunks))
        trainer = Trainer(chunks, case.layout, dataclasses.replace(case.run, lr=LR))
        inside = Inside()
        run = Run(trainer.models, trainer.optimizer, trainer.optimizer.config, config)
        before = inside.look(run)
        trainer.step(0)
        logged = inside.look(run)
        gather_parameters(trainer.models, trainer.optimizer)
        factors = assemble(chunks, torch.Tensor.detach)
    truth = dense(case, factors)
    assert logged.keys() == truth.keys()
    for name, value in truth.items():
        assert logged[name] == pytest.approx(value, rel=RTOL), name
    # What was stale would be noticed: the step changed the numbers by far more than the tolerance.
    assert max(abs(before[name] / value - 1) for name, value in truth.items() if value) > 100 * RTOL


@pytest.mark.world_2
def test_a_sum_over_ranks_left_out_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from megalora.adapters import norms

    monkeypatch.setattr(norms, "_summed", lambda own, groups: list(own))
    with pytest.raises(AssertionError, match=r"norm-A|norm-B|update"):
        test_each_layout_logs_the_numbers_of_the_unsharded_matrices(CASES[0])
