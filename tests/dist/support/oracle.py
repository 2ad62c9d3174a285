"""The unsharded model in plain torch: every adapter folded into its weight as W + c B A.

Nothing of megalora's layers, ops, collectives, segments or init is used, so an error there cannot
hide here. Adapter tensors are whole: lora_A [P r, in] and lora_B [out, r], experts first.
"""

import re
from typing import Any, NamedTuple

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor

from tests.dist.support.answers import Microbatch

Tensors = dict[str, Tensor]
# A usual epsilon of 1e-8 would turn the rounding of vanishing gradients into whole steps.
BETAS, EPS, CLIP = (0.9, 0.999), 1e-5, 1.0


class Step(NamedTuple):
    """Of a batch: the objective, the loss of each token [b, s] and dX [b, s, h]."""

    loss: float
    token_losses: Tensor
    dx: Tensor


class Oracle:
    """Train adapters of a frozen one-rank model with torch's autograd and a plain Adam.

    factors: `<module>_lora.lora_A` and `.lora_B` by global name; c is alpha / rank.
    """

    def __init__(self, model: GPTModel, factors: Tensors, alpha: float) -> None:
        self.model, self.alpha = model.requires_grad_(False), alpha
        self.factors = {key: factor.clone().requires_grad_() for key, factor in factors.items()}
        self.moments = {
            key: (torch.zeros_like(f), torch.zeros_like(f)) for key, f in factors.items()
        }

    def weights(self) -> Tensors:
        """Return W + c B A for every adapted weight, differentiable in A and B."""
        parameters = dict(self.model.named_parameters())
        merged = {}
        for key in self.factors:
            base, _, factor = key.partition("_lora.")
            if factor != "lora_A":
                continue
            a, b = self.factors[key], self.factors[f"{base}_lora.lora_B"]
            for expert, name in enumerate(self._weight_names(base)):
                own_a, own_b = (f[expert] if f.dim() == 3 else f for f in (a, b))
                update = self._product(base, own_a, own_b)
                # The last rows may have none: those of a delta net's gates.
                rest = (0, 0, 0, len(parameters[name]) - len(update))
                update = torch.nn.functional.pad(update, rest)
                merged[name] = parameters[name] + self.alpha / b.shape[-1] * update
        return merged

    def run(self, weights: Tensors, microbatch: Microbatch) -> tuple[Tensor, Tensor]:
        """Return the loss of each token [b, s] and the input of the decoder [s, b, h]."""
        inputs = []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            inputs.append(output.detach().requires_grad_())
            return inputs[-1]

        handle = self.model.embedding.register_forward_hook(keep)
        args = (microbatch.tokens, microbatch.positions, microbatch.attention_mask)
        more = {"labels": microbatch.labels, "loss_mask": microbatch.loss_mask}
        if self.model.config.num_moe_experts:
            more["padding_mask"] = microbatch.padding_mask
        losses = torch.func.functional_call(self.model, weights, args, more)
        handle.remove()
        return losses, inputs[0]

    def backward(self, microbatches: list[Microbatch], *, per_token: bool) -> "Step":
        """Accumulate the gradients of the mean loss of a step.

        per_token: over all trained tokens; else the mean of each microbatch's mean.
        """
        for factor in self.factors.values():
            factor.grad = None
        masks = [
            torch.ones_like(m.tokens) if m.loss_mask is None else m.loss_mask for m in microbatches
        ]
        # A microbatch without a trained token has a mean of 0.
        counts = [mask.sum().clamp(min=1) * len(masks) for mask in masks]
        if per_token:
            counts = [torch.stack(masks).sum().clamp(min=1)] * len(masks)
        # By what Megatron's modules multiply the losses that they add inside.
        scale = (1.0 / (counts[0] if per_token else torch.tensor(len(masks)))).view(1)
        MTPLossAutoScaler.set_loss_scale(scale)
        MoEAuxLossAutoScaler.main_loss_backward_scale = scale
        merged = self.weights()
        weights = {name: weight.detach().requires_grad_() for name, weight in merged.items()}
        found, all_losses, all_dx = 0.0, [], []
        for microbatch, mask, count in zip(microbatches, masks, counts, strict=True):
            losses, x = self.run(weights, microbatch)
            loss = (losses.float() * mask).sum() / count
            loss.backward()
            assert x.grad is not None
            found += float(loss)
            all_losses.append(losses.detach().float())
            all_dx.append(x.grad.transpose(0, 1))
        # An expert that no token met has none.
        met = [name for name, weight in weights.items() if weight.grad is not None]
        torch.autograd.backward([merged[n] for n in met], [weights[n].grad for n in met])
        return Step(found, torch.cat(all_losses), torch.cat(all_dx))

    def gradients(self) -> Tensors:
        """Return the gradient of every factor."""
        return {key: f.grad.clone() for key, f in self.factors.items() if f.grad is not None}

    @torch.no_grad()
    def step(self, number: int, lr: float) -> float:
        """Clip, take Adam's step `number` (from 1), return the norm of all gradients."""
        gradients = self.gradients()
        norm = float(torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt())
        clip = min(1.0, CLIP / (norm + 1e-6))
        for key, gradient in gradients.items():
            first, second = self.moments[key]
            gradient = gradient * clip
            first.lerp_(gradient, 1 - BETAS[0])
            second.lerp_(gradient.square(), 1 - BETAS[1])
            mean, spread = first / (1 - BETAS[0] ** number), second / (1 - BETAS[1] ** number)
            self.factors[key] -= lr * mean / (spread.sqrt() + EPS)
        return norm

    def _weight_names(self, base: str) -> list[str]:
        prefix, _, leaf = base.rpartition(".")
        if not prefix.endswith(".experts"):
            return [f"{base}.weight"]
        pattern = re.compile(rf"{re.escape(prefix)}\.local_experts\.(\d+)\.{leaf}\.weight")
        names = [name for name, _ in self.model.named_parameters() if pattern.fullmatch(name)]
        return sorted(names, key=lambda name: int(pattern.fullmatch(name)[1]))  # type: ignore[index]

    def _product(self, base: str, a: Tensor, b: Tensor) -> Tensor:
        """Return B A, each output row of B meeting the rows of A of its own projection."""
        rank = b.shape[1]
        if a.shape[0] == rank:
            return b @ a
        # Of Mamba-2's in_proj z and x are two halves, as gate and up are.
        leaf = "linear_fc1" if base.endswith("mixer.in_proj") else base.rpartition(".")[2]
        row_projection = projections(leaf, b.shape[0], self.model.config)
        a_of_row = a.unflatten(0, (-1, rank))[row_projection]
        return (b[:, None] @ a_of_row)[:, 0]


def projections(leaf: str, num_rows: int, config: Any) -> list[int]:
    """Return the Hugging Face projection of each output row of a fused Megatron linear."""
    if leaf == "linear_fc1":
        return [0 if row < num_rows // 2 else 1 for row in range(num_rows)]
    if leaf == "linear_qkv_down_proj":
        return [0 if row < config.q_lora_rank else 1 for row in range(num_rows)]
    if leaf == "in_proj":
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values, gates = (
            config.linear_num_value_heads * size for size in (config.linear_value_head_dim, 1)
        )
        sizes = (keys, keys, values, values, gates, gates)
        return [part for part, size in enumerate(sizes) for _ in range(size)][:num_rows]
    assert leaf == "linear_qkv", leaf
    size, groups = config.kv_channels, config.num_query_groups
    rows_of_group = num_rows // groups
    # Of each group's heads the last is its value, the one before it its key.
    heads = rows_of_group // size
    head = [row % rows_of_group // size for row in range(num_rows)]
    return [max(0, h - heads + 3) for h in head]
