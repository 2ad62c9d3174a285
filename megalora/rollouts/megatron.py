"""Rollouts on the training model itself, by megatron-core's static inference.

Keys and values are cached by Megatron's own layers (`StaticInferenceContext`) and stages exchange
by its own wrapper of the model (`GPTInferenceWrapper`), so the adapters are active as in training.
The loop around them, and the sampling, are here: Megatron's own loop takes the softmax in the
model's precision, draws from one generator for the whole batch, refuses sequence parallelism, and
does not wait for experts of ranks that answer longer.
"""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
    GPTInferenceWrapper,
)
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed import ProcessGroup

from megalora.adapters import world
from megalora.checkpoint.ranks import on_all_ranks
from megalora.model.hybrid import pattern_in
from megalora.rollouts.batch import Batch, in_batches
from megalora.rollouts.drawing import draw, uniforms
from megalora.rollouts.engine import Answer, Sampling
from megalora.rollouts.supported import check_request, check_supported

# What Megatron's modules and configurations call the flag that splits tokens over ranks.
_SEQUENCE_PARALLEL = ("sequence_parallel", "reduce_scatter_embeddings")


class MegatronEngine:
    """Sample answers from the model that is in training, on the ranks that train it.

    Tensor, sequence, expert and pipeline parallel; sequence parallelism is off while it samples. A
    prompt's numbers follow from the seed, the data-parallel rank and its index alone, so other
    prompts of a batch change an answer by rounding at most.

    A batch starts at its shortest prompt, up to which what is the same in several is read once;
    longer ones are read on token by token, beside the answers of the shorter. So prompts are taken
    in the order of their lengths, and a batch ends before one that is longer by more than
    max_tokens. It runs until its last answer has ended; where half of its answers have, they leave
    it. Where data-parallel ranks share experts, their batches are of
    one size, and run until the last answer of all has ended.
    """

    def __init__(
        self,
        model_chunks: Sequence[torch.nn.Module],
        *,
        max_batch_size: int = 64,
        vocab_size: int | None = None,
    ) -> None:
        """Take a model, wrapped or not.

        max_batch_size: prompts answered at a time. Their cache takes 2 * layers of the stage *
        max_batch_size * (longest prompt + max_tokens) * key-value channels of the rank * bytes of a
        weight's precision: 2 * 36 * 64 * 2048 * 1024 * 2 = 18 GiB for Qwen3-8B in bf16 on one rank.
        vocab_size: rows of the vocabulary that are tokens, where `apply_lora` was not told. Raises
        ValueError that names the flag where Megatron's inference does not do what it says.
        """
        chunks = cast(list[GPTModel | HybridModel], unwrap_model(list(model_chunks)))
        if max_batch_size < 1:
            raise ValueError(f"max_batch_size is {max_batch_size}: set 1 or more")
        config: TransformerConfig = chunks[0].config
        check_supported(
            config,  # type: ignore[arg-type]
            num_chunks=len(chunks),
            position_embedding_type=chunks[0].position_embedding_type,
            hybrid_layer_pattern=pattern_in(chunks[0]),
        )
        self.model, self.config, self.max_batch_size = chunks[0], config, max_batch_size
        self.vocab_size = vocab_size or chunks[0].vocab_size
        self._in_step = _ranks_in_step(config)

    def sync(self) -> None:
        """Do nothing: it is the model that is trained."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Answer]:
        """Return an answer to each prompt, in order; the same on all ranks that hold one replica.

        prompts: tokens. All ranks must call it, with as many prompts each. Raises ValueError on all
        ranks for a prompt that cannot be answered, where ranks disagree, and where logits are not
        finite.
        """
        on_all_ranks(lambda: self._check(prompts, sampling))
        _check_agreed(prompts, sampling)
        answers: dict[int, Answer] = {}
        batches = in_batches(
            [len(prompt) for prompt in prompts],
            max_batch_size=self.max_batch_size,
            # Another batch takes as many steps. Ranks that share experts have as many batches.
            max_spread=sampling.max_tokens if self._in_step is None else None,
        )
        with _sampling_from(self.model):
            for indices in batches:
                batch = self._start([list(prompts[index]) for index in indices], indices, sampling)
                answers.update(zip(indices, self._run(batch, sampling), strict=True))
        on_all_ranks(lambda: _check_finite(answers))
        return [answers[index] for index in range(len(prompts))]

    def _check(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
        longest = self.model.max_sequence_length
        check_request(prompts, sampling.max_tokens, self.vocab_size, longest)

    def _start(self, prompts: list[list[int]], indices: list[int], sampling: Sampling) -> Batch:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        # Ranks that share experts do steps of one size.
        bounds = torch.stack([-lengths.min(), lengths.max() + sampling.max_tokens])
        shortest, total = self._largest(bounds.to(self._device)).tolist()
        tokens = torch.zeros(len(prompts), total, dtype=torch.long)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        dp_rank = parallel_state.get_data_parallel_rank()
        numbers = uniforms(sampling.seed, dp_rank, indices, sampling.max_tokens)
        moved = (x.to(self._device) for x in (tokens, lengths, numbers))
        return Batch(*moved, shortest=-shortest)

    def _run(self, batch: Batch, sampling: Sampling) -> list[Answer]:
        """Prefill to the shortest prompt, then step by one token until all answers have ended."""
        context = StaticInferenceContext(len(batch.tokens), batch.tokens.shape[1])
        wrapper = GPTInferenceWrapper(cast(GPTModel, self.model), context)
        wrapper.prep_model_for_inference()
        stop = torch.tensor(sampling.stop, dtype=torch.long, device=self._device)
        logits, end = self._prefill(wrapper, context, batch), batch.shortest
        while True:
            batch.add(end, *self._draw(logits, batch.numbers_at(end)), stop=stop)
            if not self._largest((~batch.done).any().int()[None]).item():
                return batch.answers()
            # Ranks that share experts keep their sizes, which some dispatchers need to be alike.
            if self._in_step is None and (kept := batch.kept_of_rows()) is not None:
                _keep(context, kept)
            context.enable_decode_mode()
            logits = _forward(wrapper, batch.tokens[batch.rows], end, end + 1)
            end += 1

    def _prefill(
        self, wrapper: GPTInferenceWrapper, context: StaticInferenceContext, batch: Batch
    ) -> Tensor | None:
        """Read all prompts as far as the shortest goes, what is the same in several of them once.

        Ranks that share experts do steps of one size: they read all.
        """
        tokens = batch.tokens[:, : batch.shortest]
        if self._in_step is not None:
            return _forward(wrapper, tokens, 0, batch.shortest)
        once, rows = tokens.unique(dim=0, return_inverse=True)
        logits = _forward(wrapper, once, 0, batch.shortest)
        _keep(context, rows)
        return None if logits is None else logits[rows]

    def _draw(self, logits: Tensor | None, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the first rank of the last stage draws: tokens and log probabilities [b]."""
        drawn = numbers.new_empty(2, len(numbers))
        if logits is not None:
            drawn = torch.stack(
                [x.double() for x in draw(logits[:, -1, : self.vocab_size], numbers)]
            )
        group = _group(parallel_state.get_model_parallel_group())
        if group.size() > 1:
            ranks = dist.get_process_group_ranks(group)
            # Tensor-parallel ranks, which are side by side, may round differently.
            source = ranks[-self.config.tensor_model_parallel_size]
            dist.broadcast(drawn, src=source, group=group)
        return drawn[0].long(), drawn[1].float()

    def _largest(self, numbers: Tensor) -> Tensor:
        """Return the largest of numbers on all ranks that must do each step together."""
        if self._in_step is not None:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._in_step)
        return numbers

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _forward(wrapper: GPTInferenceWrapper, tokens: Tensor, start: int, end: int) -> Tensor | None:
    """Return the logits after tokens [b, start:end], [b, 1, v], where this is the last stage."""
    own = tokens[:, start:end]
    positions = torch.arange(start, end, device=tokens.device).expand_as(own)
    inputs = {"tokens": own, "position_ids": positions, "attention_mask": None}
    # NOTE: `run_one_forward_step` is in inference mode, whose tensors the rotary table would keep.
    if wrapper.model_is_pipeline_parallel:
        return wrapper.forward_pass_with_pipeline_parallel(inputs)
    return wrapper.forward_pass_without_pipeline_parallel(inputs)


def _keep(context: StaticInferenceContext, rows: Tensor) -> None:
    """Keep the keys and values of some rows of the cache, [s, b, ...]."""
    memory = context.key_value_memory_dict
    for layer, (keys, values) in memory.items():
        memory[layer] = keys[:, rows], values[:, rows]


@contextlib.contextmanager
def _sampling_from(model: GPTModel | HybridModel) -> Iterator[None]:
    """Make a model ready to be sampled from, and as it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    flags = []
    was_active, received = InferenceMode.is_active(), model.decoder.input_tensor
    try:
        for module in model.modules():
            for owner in (module, getattr(module, "config", None)):
                for name in _SEQUENCE_PARALLEL:
                    if getattr(owner, name, False):
                        flags.append((owner, name, getattr(owner, name)))
                        setattr(owner, name, False)
        InferenceMode.set_active()
        with torch.no_grad():
            yield
    finally:
        for owner, name, value in flags:
            setattr(owner, name, value)
        for module, training in modes:
            module.training = training
        model.set_input_tensor(cast(Tensor, received))
        if not was_active:
            InferenceMode.unset_active()


def _ranks_in_step(config: TransformerConfig) -> ProcessGroup | None:
    """Return the ranks, beyond a tensor-parallel group, whose experts need each other's steps."""
    sizes = config.expert_model_parallel_size, config.expert_tensor_parallel_size or 1
    num_expert_ranks, tp_size = sizes[0] * sizes[1], config.tensor_model_parallel_size
    if not config.num_moe_experts or tp_size % num_expert_ranks == 0:
        return None
    if num_expert_ranks % tp_size == 0:
        return _group(parallel_state.get_expert_tensor_and_model_parallel_group())
    return _group(parallel_state.get_tensor_and_data_parallel_group())


def _group(group: object) -> ProcessGroup:
    return cast(ProcessGroup, group)


def _check_agreed(prompts: Sequence[Sequence[int]], sampling: Sampling) -> None:
    """Raise ValueError on all ranks that would wait for each other, or answer something else."""
    asked = repr(([list(prompt) for prompt in prompts], sampling))
    number, group = zlib.crc32(asked.encode()), _group(parallel_state.get_model_parallel_group())
    # Numbers with their negatives, whose largest tell the smallest.
    most = world.largest([number, -number], group)
    bounds = [n for value in (len(prompts), sampling.max_tokens) for n in (value, -value)]
    is_other, *most = world.largest([most[0] != -most[1], *bounds])
    if not is_other and all(most[at] == -most[at + 1] for at in (0, 2)):
        return
    own = (parallel_state.get_data_parallel_rank(), number)
    ranks = [((0, 0), 0, 0)] * dist.get_world_size()
    dist.all_gather_object(ranks, (own, len(prompts), sampling.max_tokens))
    replicas, counts, limits = zip(*ranks, strict=True)
    for name, numbers in (("prompts", counts), ("max_tokens", limits)):
        if len(set(numbers)) > 1:
            raise ValueError(
                f"ranks have {name} {list(numbers)}: give all as many, their experts answer "
                "together"
            )
    if len(set(replicas)) > len({dp_rank for dp_rank, _ in replicas}):
        raise ValueError(
            "ranks of one data-parallel rank have different prompts or sampling: give all "
            "tensor-parallel ranks and pipeline stages that hold one replica the same"
        )


def _check_finite(answers: dict[int, Answer]) -> None:
    for index, answer in answers.items():
        if not torch.tensor(answer.logprobs).isfinite().all():
            raise ValueError(
                f"the answer to prompt {index} has log probabilities that are not finite: the "
                "model's logits overflow, lower the learning rate"
            )
