"""Compare adapters in a parallel layout with the unsharded oracle, one error for each quantity.

`errors` runs a case and returns the largest relative error of the start values, token losses, the
objective as it is logged, dX, adapter gradients, gradient norms and the weights after some steps of
Megatron's optimizer.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megalora.builder import apply_lora, named_adapters
from megalora.checkpoint.gather import load_adapters
from megalora.config import LoRAConfig
from tests.dist.support.answers import Answers
from tests.dist.support.cases import KINDS, Case
from tests.dist.support.layouts import Layout, model_parallel, one_rank
from tests.dist.support.models import build_model
from tests.dist.support.oracle import EPS, Oracle, Tensors
from tests.dist.support.training import NUM_SEQUENCES, SEQ_LENGTH, Run, context_parallel_cut, train

# The second step has the first one's moments and the weights that it left everywhere; `make parity`
# and `make test-full` take one more.
NUM_STEPS = 2
LR = 1e-2
ALPHA = 6.0
STD_B = 0.2


@dataclasses.dataclass
class Truth:
    """What the oracle says; factors are those before and after all steps."""

    losses: Tensor
    dx: Tensor
    gradients: Tensors
    objective: list[float]
    norms: list[float]
    start: Tensors
    end: Tensors


def lora_config(kind: str, **overrides: Any) -> LoRAConfig:
    """Return the adapters of a kind, with alpha != rank so that a wrong scale is noticed."""
    return LoRAConfig(**{"rank": 4, "alpha": ALPHA, **KINDS[kind].lora, **overrides})


def truth(
    world_size: int,
    kind: str,
    dtype: torch.dtype = torch.float32,
    answers: Answers | None = None,
    skipped: tuple[int, ...] = (),
    num_steps: int = NUM_STEPS,
) -> Truth:
    """Run the oracle of a kind in fp32, from weights rounded to dtype, in every process.

    Once for each question. skipped: steps whose gradients are not used.
    """
    return _truth(world_size, kind, dtype, answers, skipped, num_steps)


@functools.cache
def _truth(
    world_size: int,
    kind: str,
    dtype: torch.dtype,
    answers: Answers | None,
    skipped: tuple[int, ...],
    num_steps: int,
) -> Truth:
    alone, model = one_rank(Layout(dp=world_size)), {**KINDS[kind].model, **objective(answers)}
    with model_parallel(alone):
        start = start_values(apply_lora(build_model(alone, **model), lora_config(kind)))
        (base,) = build_model(alone, **{**model, "tied": False})
        if model.get("tied"):
            # Its adapter changes the unembedding alone.
            base.output_layer.weight.data.copy_(base.embedding.word_embeddings.weight.data)
        for parameter in base.parameters():
            parameter.data.copy_(parameter.data.to(dtype))
        start = {key: factor.to(dtype).float() for key, factor in start.items()}
        oracle = Oracle(base, start, ALPHA)
        return _train_oracle(oracle, start, answers, skipped, num_steps)


def objective(answers: Answers | None) -> dict[str, Any]:
    """Return the fields of a configuration that say what is minimized."""
    return {"calculate_per_token_loss": answers is not None and answers.per_token}


def _train_oracle(
    oracle: Oracle,
    start: Tensors,
    answers: Answers | None,
    skipped: tuple[int, ...],
    num_steps: int,
) -> Truth:
    # The mean of equally large microbatches is that of all their sequences at once.
    run = Run(answers=answers)
    per_token = answers is not None and answers.per_token
    steps, norms, gradients = [], [], {}
    for number in range(num_steps):
        steps.append(oracle.backward(run.whole_batch(number), per_token=per_token))
        gradients = gradients or oracle.gradients()
        if number not in skipped:
            norms.append(oracle.step(len(norms) + 1, LR))
    end = {key: factor.detach() for key, factor in oracle.factors.items()}
    first, losses = steps[0], [step.loss for step in steps]
    return Truth(first.token_losses, first.dx, gradients, losses, norms, start, end)


def start_values(chunks: list[Any]) -> Tensors:
    """Return A as megalora draws it and a B that is not zero, so that A has a gradient."""
    factors = assemble(chunks, torch.Tensor.detach)
    return {
        key: draw_b(key, factor) if key.endswith("lora_B") else factor
        for key, factor in factors.items()
    }


def draw_b(key: str, like: Tensor) -> Tensor:
    """Draw a whole lora_B by its name."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(like.shape, generator=generator) * STD_B).to(like.dtype)


def assemble(chunks: list[Any], value: Callable[[Any], Tensor]) -> Tensors:
    """Put whole tensors together from `value` of every rank's adapter parameters.

    Raises AssertionError where two ranks hold different numbers of the same part.
    """
    shards = [
        shard
        for name, adapter in named_adapters(chunks)
        for sharded in adapter.sharded_tensors(f"{name}.").values()
        for shard in _shards(sharded, value(sharded.data).clone())
    ]
    own = [(shard.key, shard.global_shape, _where(shard), _packed(shard.data)) for shard in shards]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, own)
    whole: Tensors = {}
    for key, shape, where, packed in (entry for rank in everywhere for entry in rank):
        part = _unpacked(*packed)
        full = whole.setdefault(key, torch.full(shape, float("nan"), dtype=part.dtype))
        known = full[where]
        same = known.isnan().all() or torch.equal(known, part)
        assert same, f"replicas of {key} differ by {(known - part).abs().max()}"
        full[where] = part
    assert not any(tensor.isnan().any() for tensor in whole.values()), "a part has no owner"
    whole = _join_parts(whole)
    return {key: _flat(key, tensor) for key, tensor in sorted(whole.items())}


def _packed(tensor: Tensor | None) -> tuple[Any, torch.dtype, torch.Size]:
    """Return a tensor's bytes: a pickled tensor takes seven times as long."""
    assert tensor is not None
    return tensor.flatten().view(torch.uint8).numpy(), tensor.dtype, tensor.shape


def _unpacked(data: Any, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return torch.from_numpy(data).view(dtype).view(shape)


def _shards(sharded: ShardedTensor | ShardedTensorFactory, data: Tensor) -> list[ShardedTensor]:
    if isinstance(sharded, ShardedTensorFactory):
        return sharded.build_fn(sharded.key, data, sharded.replica_id, None)
    return [dataclasses.replace(sharded, data=data, dtype=data.dtype)]


def _join_parts(whole: Tensors) -> Tensors:
    """Put parts that are stored each by itself in the weight's order.

    Those of Mamba's in_proj and a delta net's, and of the joint down projection of attention
    through latents.
    """
    delta_net = ("query", "key", "value", "z")
    orders = (*(("z", "x", "B", "C", "dt"), ("q", "kv")), (*delta_net, "beta", "alpha"), delta_net)
    orders = (*orders, ("z", "x"))
    parts = {name for order in orders for name in order}
    joined = {key: whole[key] for key in whole if key.rpartition(".")[2] not in parts}
    for stem in {key.rpartition(".")[0] for key in whole if key not in joined}:
        found = next(order for order in orders if all(f"{stem}.{name}" in whole for name in order))
        joined[stem] = torch.cat([whole[f"{stem}.{name}"] for name in found])
    return joined


def _where(shard: ShardedTensor) -> tuple[slice, ...]:
    pairs = zip(shard.global_offset, shard.local_shape, strict=True)
    return tuple(slice(offset, offset + size) for offset, size in pairs)


def _flat(key: str, tensor: Tensor) -> Tensor:
    """Give a gated factor of the output, as lora_B [(E,) 2, f, r], its output dimension back."""
    name = key.rpartition(".")[2]
    if not key.endswith(f"linear_fc1_lora.{name}") or name == "lora_A":
        return tensor
    own = 2 if name == "lora_B" else 1
    first = int(".experts." in f".{key}")
    return tensor.flatten(first, first + 1) if tensor.dim() > first + own else tensor


class Probe:
    """Collect what a layout computes in its first step, by hooks from outside."""

    def __init__(self, chunks: list[Any], layout: Layout, run: Run) -> None:
        self.chunks, self.layout, self.run = chunks, layout, run
        self.losses: list[Tensor] = []
        self.dx: list[Tensor] = []
        self.gradients: Tensors = {}
        self.first, self.expected = True, False
        for chunk in chunks:
            if chunk.pre_process:
                chunk.register_forward_pre_hook(self._expect_embedding)
                chunk.embedding.register_forward_hook(self._keep_dx)
            if chunk.post_process:
                chunk.register_forward_hook(self._keep_losses)

    def _expect_embedding(self, _module: Any, _inputs: Any) -> None:
        self.expected = self.first

    def _keep_dx(self, _module: Any, _inputs: Any, output: Tensor) -> Tensor:
        # Multi-token prediction embeds its own tokens later.
        if self.expected:
            self.expected = False
            output.requires_grad_(True)
            output.register_hook(lambda grad: self.dx.append(grad.detach().float()))
        return output

    def _keep_losses(self, _module: Any, _inputs: Any, output: Tensor) -> None:
        if self.first:
            self.losses.append(output.detach().float())

    def on_gradients(self, _step: int) -> None:
        """Take the gradients of the first step."""
        if self.first and not self.run.distributed_optimizer:
            scale = self.run.loss_scale
            self.gradients = assemble(self.chunks, lambda p: p.main_grad.float() / scale)
        self.first = False

    def whole_losses(self) -> Tensor:
        """Return the token losses [b, s] of the whole batch."""
        return self._whole(self.losses, None)

    def whole_dx(self) -> Tensor:
        """Return dX [b, s, h] of the objective."""
        parts = [x.transpose(0, 1) for x in self.dx]
        whole = self._whole(parts, self.layout.tp if self.layout.sp else None)
        whole /= self.run.loss_scale
        answers = self.run.answers
        if answers is not None and answers.per_token:
            # Megatron divides gradients by the trained tokens at the end of a step.
            return whole / sum(m.loss_mask.sum() for m in answers.microbatches(0))
        return whole / (self.layout.dp * self.layout.cp)

    def _whole(self, parts: list[Tensor], sequence_shards: int | None) -> Tensor:
        cut = context_parallel_cut(self.layout, self.run)
        if sequence_shards is not None:
            cut = cut.chunk(sequence_shards)[parallel_state.get_tensor_model_parallel_rank()]
        data_rank = parallel_state.get_data_parallel_rank()
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, (data_rank, cut, torch.cat(parts) if parts else None))
        found = [entry for entry in everywhere if entry[2] is not None]
        tail = found[0][2].shape[2:]
        whole = torch.full((NUM_SEQUENCES, SEQ_LENGTH, *tail), float("nan"))
        for data_rank, cut, part in found:
            rows = torch.tensor(self.run.rows(data_rank, self.layout.dp))[:, None]
            known = whole[rows, cut]
            if not known.isnan().all():
                torch.testing.assert_close(known, part, rtol=1e-5, atol=1e-7)
            whole[rows, cut] = part
        assert not whole.isnan().any()
        return whole


def errors(case: Case, num_steps: int = NUM_STEPS) -> dict[str, float]:
    """Run a case for some steps and return its largest relative errors by quantity."""
    layout, answers = case.layout, case.run.answers
    fields = {**KINDS[case.kind].model, **objective(answers), **case.fields}
    expected = truth(layout.world_size, case.kind, case.dtype, answers, num_steps=num_steps)
    with model_parallel(layout):
        chunks = build_model(layout, **fields)
        apply_lora(chunks, lora_config(case.kind, ops=case.ops))
        start = start_values(chunks)
        load_adapters(chunks, start)
        probe = Probe(chunks, layout, case.run)
        run = dataclasses.replace(
            case.run,
            num_steps=num_steps,
            lr=LR,
            adam_eps=EPS,
            on_gradients=probe.on_gradients,
        )
        history = train(chunks, layout, run)
        found = {
            "start": largest(start, expected.start),
            "loss": relative(probe.whole_losses(), expected.losses),
            "objective": relative(history[:, 0], torch.tensor(expected.objective)),
            "dX": relative(probe.whole_dx(), expected.dx),
            "norm": relative(history[:, 1], torch.tensor(expected.norms)),
            "weights": largest(assemble(chunks, torch.Tensor.detach), expected.end),
        }
        if probe.gradients:
            found["gradient"] = largest(probe.gradients, expected.gradients)
        return found


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the Euclidean norm."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    scale = expected.double().norm()
    assert scale > 0, "nothing to compare with: the comparison would be vacuous"
    return float((actual.double() - expected.double()).norm() / scale)


def largest(actual: Tensors, expected: Tensors) -> float:
    """Return the largest relative error of all tensors; both must have the same."""
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    return max(relative(actual[key], expected[key]) for key in expected)
