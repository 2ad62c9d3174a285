"""Check an exported adapter: transformers and peft must give Megatron's logits.

torchrun --nproc-per-node 1 examples/verify_export.py <Megatron flags> --lora-rank 16
    --hf-model DIR --lora-load ADAPTER_CHECKPOINT --adapter PEFT_DIR --result FILE.json

The base is --hf-model; or --pretrained-checkpoint, which is then written as a Hugging Face
directory first: with --hf-base DIR --hf-family qwen3_moe.

Loads base and adapter with the real transformers and peft, compares logits on held-out answers, and
negates one lora_B as a negative control. Exit status 1 where they differ. Where two experts' scores
are as close as rounding, the two sides may choose differently: what follows such a token is not
compared.
"""

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megalora import add_lora_args, launch

launch.prepare_megatron(sys.argv)  # before the first import of megatron

import torch  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from megatron.training.arguments import parse_and_validate_args  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402

from megalora import set_enabled  # noqa: E402
from megalora.checkpoint.durable import write_whole  # noqa: E402
from megalora.data import add_data_args, datasets_from_args  # noqa: E402
from megalora.model.families import FAMILIES  # noqa: E402
from megalora.training import session  # noqa: E402
from megalora.training.needed import check_started  # noqa: E402

TOLERANCE = 1e-4
MAX_SEQUENCES = 32
# A difference of router logits that rounding may turn over.
TIE = 1e-5


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add this script's flags to Megatron's."""
    add = parser.add_argument
    add("--cpu", action="store_true", help="run on the CPU over gloo")
    add("--adapter", type=Path, required=True, help="PEFT directory to check")
    add("--hf-base", type=Path, help="directory to write the base to, without --hf-model")
    add(
        "--hf-family",
        choices=sorted(FAMILIES),
        metavar="MODEL_TYPE",
        help="model_type of its config.json, such as qwen3_moe",
    )
    add("--result", type=Path, required=True, help="JSON file to write the numbers to")
    return launch.add_exchange_args(add_data_args(add_lora_args(parser)))


def main() -> int:
    """Compare and write the numbers; return the exit status."""
    with launch.clear_errors():
        sys.argv[1:] = launch.with_hf_flags(sys.argv[1:])
        args = parse_and_validate_args(extra_args_provider=add_args)
        check_args(args)
        lora = launch.LoRARun(args)
        model_config = session.model_config(args)
        pretrain_cfg_container_from_args(args, model_config)
        initialize_megatron()
        return compare(build(model_config, lora), args)


def check_args(args: Any) -> None:
    """Raise ValueError for flags without which nothing can be compared, before a model is built."""
    check_started()
    if args.dataset is None:
        raise ValueError("dataset is not given: set --dataset, whose held-out answers are compared")
    if not args.lora_rank:
        raise ValueError("lora_rank is not given: set --lora-rank to that of the adapter's run")
    if not args.hf_model and not (args.hf_base and args.hf_family):
        raise ValueError(
            "hf_model is not given: set --hf-model to the base's directory, or --hf-base and "
            "--hf-family to write one"
        )
    if not args.adapter.is_dir():
        raise ValueError(
            f"adapter {str(args.adapter)!r} is no directory: give what --export-hf or `megalora "
            "export` wrote"
        )


def compare(model: list[Any], args: Any) -> int:
    """Compare both sides, write the numbers, and return the exit status."""
    tokens, labels, loss_mask, mask = held_out(args)
    chunk = model[0]
    set_enabled(model, False)
    base_loss = answer_loss(chunk, (tokens, labels, loss_mask, mask))
    base = args.hf_model or write_base(model, args)
    set_enabled(model, True)
    lora_loss = answer_loss(chunk, (tokens, labels, loss_mask, mask))
    # Enough to compare. A sequence holds several examples, which peft mixes: so both sides do.
    few = tokens[:4]
    with router_logits(chunk) as choices:
        whole = megatron_logits(chunk, few, causal(tokens))
    same = decided(choices, args.moe_router_topk, few)
    peft_model = load_peft(base, args.adapter)
    error = relative_error(peft_logits(peft_model, few)[same], whole[same])
    negate_one(peft_model)
    control = relative_error(peft_logits(peft_model, few)[same], whole[same])
    numbers = {
        "base_loss": base_loss,
        "lora_loss": lora_loss,
        "base_parameters": sum(p.numel() for p in chunk.parameters() if not p.requires_grad),
        "lora_parameters": sum(p.numel() for p in chunk.parameters() if p.requires_grad),
        "error": error,
        "control": control,
        "compared": float(same.float().mean()),
    }
    write_whole(args.result, json.dumps(numbers, indent=1))
    passed = error < TOLERANCE < control and numbers["compared"] > 0.5
    print(f"verified: {json.dumps(numbers)}" if passed else f"error: {json.dumps(numbers)}")
    return 0 if passed else 1


def build(model_config: Any, lora: launch.LoRARun) -> list[Any]:
    """Build the model on this one process, load the base, attach and load the adapters."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    builder = model_config.get_builder_cls()(model_config)
    chunk = builder.build_model(ProcessGroupCollection.use_mpu_process_groups(), True, True)
    # torch's norms are built on the CPU.
    return [part.eval() for part in lora.prepare([chunk.cuda()])]


def held_out(args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, labels, loss mask [b, s] and attention mask of held-out answers."""
    from megalora.data.batch import block_diagonal_mask

    _, valid, _ = datasets_from_args(args, (1, MAX_SEQUENCES, 0))
    assert valid is not None
    # Asked for more than there are, it would begin anew.
    rows = [valid[index] for index in range(min(MAX_SEQUENCES, len(valid.rows)))]
    stacked = {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    mask = block_diagonal_mask(stacked["cu_seqlens"].long())
    return stacked["tokens"].long(), stacked["labels"].long(), stacked["loss_mask"].float(), mask


def causal(tokens: torch.Tensor) -> torch.Tensor:
    """Return the mask [1, 1, s, s] that hides only later tokens."""
    s = tokens.shape[1]
    return torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]


@torch.no_grad()
def megatron_logits(chunk: Any, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return logits [b, s, vocabulary] on the CPU, of Megatron's model."""
    device = next(chunk.parameters()).device
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return chunk(*(x.to(device) for x in (tokens, positions, mask))).float().cpu()


@contextlib.contextmanager
def router_logits(chunk: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the logits [s, b, experts] of every router that runs meanwhile."""
    found: list[torch.Tensor] = []
    routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
    hooks = [
        router.register_forward_hook(lambda router, given, _: found.append(router.gating(given[0])))
        for router in routers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def decided(choices: list[torch.Tensor], topk: int, tokens: torch.Tensor) -> torch.Tensor:
    """Return which tokens [b, s] come before any that two experts are as good for.

    choices: logits [s, b, experts] of each router; a token is seen by all that follow it.
    """
    tied = torch.zeros_like(tokens, dtype=torch.bool)
    for logits in choices:
        best = logits.topk(topk + 1).values
        tied |= (best[..., -2] - best[..., -1] < TIE).t().cpu()
    return tied.int().cumsum(1) == 0


def answer_loss(chunk: Any, rows: tuple[torch.Tensor, ...]) -> float:
    """Return the mean loss in nats over the answers' tokens; four sequences at a time.

    rows: tokens, labels, loss mask [b, s] and attention mask [b, 1, s, s].
    """
    total = 0.0
    for tokens, labels, loss_mask, mask in zip(*(x.split(4) for x in rows), strict=True):
        logits = megatron_logits(chunk, tokens, mask).flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none")
        total += float((losses * loss_mask.flatten()).sum())
    return total / float(rows[2].sum())


def write_base(model: list[Any], args: Any) -> Path:
    """Write the base as a Hugging Face directory, and return it."""
    from megalora.hf.base_out import hf_config, save_hf_base

    config = hf_config(
        model[0],
        model_type=args.hf_family,
        vocab_size=args.vocab_size,
        max_position_embeddings=args.max_position_embeddings,
    )
    save_hf_base(model, args.hf_base, config, overwrite=True)
    return args.hf_base


def load_peft(base: str | Path, adapter: Path) -> Any:
    """Load base and adapter; a key that peft misses or does not know is an error."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        peft_model = PeftModel.from_pretrained(model, adapter)
        unexpected = peft_model.load_adapter(adapter, "check").unexpected_keys
    missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
    if missing or unexpected:
        raise ValueError(f"peft did not load all of {adapter}: {missing} {list(unexpected)[:5]}")
    peft_model.set_adapter("default")
    return peft_model.eval()


@torch.no_grad()
def peft_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits [b, s, vocabulary] of the peft model."""
    return model(tokens).logits.float()


def negate_one(model: Any) -> None:
    """Spoil the adapter: the check must notice it."""
    name, param = next((n, p) for n, p in model.named_parameters() if "lora_B.default" in n)
    assert param.abs().max() > 0, name
    with torch.no_grad():
        param.neg_()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return |got - wanted| / |wanted| over the vocabulary that both have."""
    wanted = wanted[..., : got.shape[-1]]
    return float((got - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    sys.exit(main())
