"""The launch script of a plan without one: a GPT or hybrid model of Megatron's flags.

`megalora.plan.script` runs it; flags of LoRA and the hook of its adapters come as to any script.
"""

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megalora.data import add_data_args
from megalora.data.batch import datasets_provider, forward_step
from megalora.training.session import model_config

# What a script would have to be told, and no size depends on.
_DEFAULTS = {"tokenizer_type": "NullTokenizer", "eval_interval": 1000, "lr": 1e-4}


def main() -> None:
    """Train what the flags describe."""
    args = parse_and_validate_args(extra_args_provider=add_data_args, args_defaults=_DEFAULTS)
    pretrain(
        pretrain_cfg_container_from_args(args, model_config(args)),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
    )


if __name__ == "__main__":
    main()
