"""The toy models, built by Megatron, adapted by megalora and trained by Megatron's optimizer."""

from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from benchmarks.regret.task import SEQ_LENGTH, VOCAB_SIZE
from megalora import LoRAConfig, apply_lora

Kind = Literal["dense", "moe"]
INIT_SEED = 7

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 4,
    "kv_channels": 16,
    "ffn_hidden_size": 192,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 8,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 96,
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
}


def start_megatron() -> None:
    """Set Megatron up in this process alone; `megalora.cpu.install` has run where it is needed."""
    if dist.is_initialized():
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(INIT_SEED)


def build(kind: Kind) -> GPTModel:
    """Build a toy model with Megatron's start values."""
    torch.manual_seed(INIT_SEED)
    config = TransformerConfig(
        **SIZES,
        **(EXPERTS if kind == "moe" else {}),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.1,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        cast(ModuleSpec, get_gpt_decoder_block_spec(config, use_transformer_engine=False)),
        vocab_size=VOCAB_SIZE,
        max_sequence_length=SEQ_LENGTH,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
    )


class Trainer:
    """A model with its optimizer; `lora` None trains whatever requires a gradient.

    The rate is constant, as the article's; Adam has no weight decay and no gradient is clipped.
    A model in bf16 has Adam's weights, and adds up its gradients, in fp32.
    """

    def __init__(
        self,
        model: GPTModel,
        lora: LoRAConfig | None,
        lr: float,
        *,
        adam_eps: float,
    ) -> None:
        if lora is not None:
            apply_lora([model], lora)
        is_bf16 = model.config.bf16
        wrapped = Float16Module(model.config, model) if is_bf16 else model
        options = DistributedDataParallelConfig(grad_reduce_in_fp32=is_bf16)
        self.model = DistributedDataParallel(model.config, options, wrapped)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                bf16=is_bf16,
                params_dtype=model.config.params_dtype,
                lr=lr,
                weight_decay=0.0,
                clip_grad=0.0,
                adam_beta1=0.9,
                adam_beta2=0.95,
                adam_eps=adam_eps,
            ),
            [self.model],
        )

    def logits(self, tokens: Tensor) -> Tensor:
        """Return [b, s, v] for tokens [b, s]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return self.model(tokens, positions, None)

    def step(self, losses: Iterable[Tensor]) -> None:
        """Update by the gradient of the sum of losses."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        for loss in losses:
            loss.backward()
        self.model.finish_grad_sync()
        self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        """Change the rate of all parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr


def token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean loss in nats of the tokens that the rules decide: from the third on.

    logits: [b, s, v] of tokens[:, :-1]. tokens: [b, s + 1].
    """
    predictions, targets = logits[:, 1:], tokens[:, 2:]
    return torch.nn.functional.cross_entropy(predictions.flatten(0, 1), targets.flatten())
