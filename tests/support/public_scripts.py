"""The flags of public training scripts of Megatron-LM core_v0.19.0, and what a CPU changes of them.

Values are the scripts' own; `TINY` has the sizes that replace them here.
"""

import shlex

LLAMA3_8B = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336
--num-attention-heads 32 --group-query-attention --num-query-groups 8 --kv-channels 128
--seq-length 8192 --max-position-embeddings 8192 --position-embedding-type rope
--rotary-base 1000000 --rotary-percent 1.0 --attention-dropout 0.0 --hidden-dropout 0.0 --swiglu
--normalization RMSNorm --init-method-std 0.0134 --attention-backend fused --apply-layernorm-1p
--untie-embeddings-and-output-weights --disable-bias-linear
--micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000
--lr-decay-samples 1949218748 --lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001
--decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5 --lr-decay-style cosine --clip-grad 1.0
--weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16 --grad-reduce-in-bf16
--cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc --empty-unused-memory-level 1
--exit-duration-in-mins 235
--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
--fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max --fp8-param-gather
--tensor-model-parallel-size 1 --context-parallel-size 1 --sequence-parallel
--mock-data --tokenizer-type NullTokenizer --vocab-size 128256 --tiktoken-pattern v2
--split 99,1,0 --no-create-attention-mask-in-dataloader --no-mmap-bin-files --num-workers 1
--log-interval 1 --eval-iters 32 --eval-interval 100 --save-interval 1000 --log-throughput
--profile --profile-step-start 4 --profile-step-end 6 --ckpt-format torch_dist
--distributed-timeout-minutes 60
"""
MIXTRAL_8X7B = """
--use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768
--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--init-method-std 0.01 --attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm
--position-embedding-type rope --swiglu --untie-embeddings-and-output-weights
--group-query-attention --num-query-groups 8 --no-masked-softmax-fusion --no-position-embedding
--rotary-base 1000000
--num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss
--moe-aux-loss-coeff 1e-2 --moe-grouped-gemm --moe-token-dispatcher-type alltoall
--overlap-param-gather --overlap-grad-reduce
--tokenizer-type Llama2Tokenizer --split 99990,8,2
--micro-batch-size 1 --global-batch-size 256 --lr 1e-4 --train-iters 500000
--lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1
--lr-warmup-iters 500 --clip-grad 1.0 --bf16
--tensor-model-parallel-size 1 --pipeline-model-parallel-size 4 --expert-model-parallel-size 8
--use-distributed-optimizer --sequence-parallel
--log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10
--no-load-optim --no-load-rng
"""
# Of its reinforcement learning; what is left are the flags of the model and the optimizer.
QWEN3_30B_A3B = """
--micro-batch-size 1 --global-batch-size 256 --seq-length 8192
--no-use-tokenizer-model-from-checkpoint-args --bf16
--tensor-model-parallel-size 4 --pipeline-model-parallel-size 1 --expert-model-parallel-size 2
--attention-backend flash --transformer-impl transformer_engine --te-rng-tracker
--tokenizer-type HuggingFaceTokenizer --tokenizer-hf-include-special-tokens
--untie-embeddings-and-output-weights --num-layers 48 --hidden-size 2048 --ffn-hidden-size 6144
--num-attention-heads 32 --kv-channels 128 --max-position-embeddings 8192 --group-query-attention
--num-query-groups 4 --normalization RMSNorm --norm-epsilon 1e-6 --position-embedding-type rope
--rotary-percent 1.0 --rotary-base 1000000 --use-rotary-position-embeddings --swiglu
--disable-bias-linear --num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768
--moe-aux-loss-coeff 0.001 --moe-router-load-balancing-type aux_loss --attention-dropout 0.0
--hidden-dropout 0.0 --no-masked-softmax-fusion --attention-softmax-in-fp32 --vocab-size 151936
--make-vocab-size-divisible-by 128 --dist-ckpt-strictness log_unexpected --qk-layernorm
--moe-token-dispatcher-type alltoall --moe-layer-freq 1 --optimizer adam --adam-beta1 0.9
--adam-beta2 0.999 --adam-eps 1e-8 --lr 1e-6 --min-lr 1e-7 --lr-warmup-samples 0 --clip-grad 1.0
--weight-decay 0.01 --no-load-optim --ckpt-format torch_dist
"""
# Of its functional test, which has a layout for its pipeline, and its example, which recomputes.
DEEPSEEK_V3 = """
--distributed-timeout-minutes 60 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 4
--pipeline-model-parallel-layout Et*2|(tt|)*5t|tmL --expert-model-parallel-size 16
--context-parallel-size 1 --expert-tensor-parallel-size 1 --use-distributed-optimizer
--overlap-grad-reduce --overlap-param-gather --use-mcore-models --sequence-parallel
--use-flash-attn --disable-bias-linear --micro-batch-size 1 --global-batch-size 512
--train-samples 24414062 --exit-duration-in-mins 220 --no-check-for-nan-in-loss-and-grad
--cross-entropy-loss-fusion --cross-entropy-fusion-impl native --manual-gc --manual-gc-interval 10
--transformer-impl transformer_engine --seq-length 4096 --tokenizer-type GPTSentencePieceTokenizer
--split 99,1,0 --no-mmap-bin-files --no-create-attention-mask-in-dataloader --num-workers 6
--num-layers 14 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128
--kv-channels 128 --max-position-embeddings 4096 --position-embedding-type rope
--rotary-base 10000 --make-vocab-size-divisible-by 3232 --normalization RMSNorm
--norm-epsilon 1e-6 --swiglu --untie-embeddings-and-output-weights --multi-latent-attention
--mtp-num-layers 1 --mtp-loss-scaling-factor 0.1 --attention-dropout 0.0 --hidden-dropout 0.0
--clip-grad 1.0 --weight-decay 0.1 --qk-layernorm --lr-decay-samples 24413696
--lr-warmup-samples 1536000 --lr-warmup-init 1e-7 --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine
--adam-beta1 0.9 --adam-beta2 0.95 --num-experts 64 --moe-layer-freq ([0]*3+[1]*11)
--moe-ffn-hidden-size 2048 --moe-shared-expert-intermediate-size 2048
--moe-router-load-balancing-type seq_aux_loss --moe-router-topk 8 --moe-token-dispatcher-type flex
--moe-flex-dispatcher-backend hybridep --moe-router-pre-softmax --moe-grouped-gemm
--moe-aux-loss-coeff 1e-4 --moe-router-group-topk 4 --moe-router-num-groups 8
--moe-router-topk-scaling-factor 2.5 --moe-router-score-function sigmoid
--moe-router-enable-expert-bias --moe-router-bias-update-rate 1e-3 --moe-router-dtype fp32
--moe-permute-fusion --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128
--qk-pos-emb-head-dim 64 --v-head-dim 128 --rotary-scaling-factor 40 --mscale 1.0
--mscale-all-dim 1.0 --eval-iters 32 --eval-interval 200 --auto-detect-ckpt-format
--save-interval 250 --save-retain-interval 5000 --dist-ckpt-strictness log_all
--init-method-std 0.02 --log-timers-to-tensorboard --log-memory-to-tensorboard
--log-num-zeros-in-grad --log-params-norm --log-validation-ppl-to-tensorboard --log-throughput
--log-interval 1 --logging-level 40 --bf16 --enable-experimental --exit-interval 47683
--recompute-granularity selective --recompute-modules mlp moe mla_up_proj layernorm
"""

# What needs a GPU's kernels, TransformerEngine or a tokenizer's files, or is not in the wheel.
NOT_HERE = {
    *("--fp8-format", "--fp8-amax-history-len", "--fp8-amax-compute-algo", "--fp8-param-gather"),
    *("--attention-backend", "--use-flash-attn", "--te-rng-tracker", "--apply-layernorm-1p"),
    *("--profile", "--profile-step-start", "--profile-step-end", "--tokenizer-type"),
    *("--moe-grouped-gemm", "--moe-permute-fusion", "--moe-flex-dispatcher-backend"),
    *("--transformer-impl", "--tokenizer-hf-include-special-tokens"),
}
# Two samples a step, two steps.
TINY = {
    "--hidden-size": "64",
    "--ffn-hidden-size": "96",
    "--num-attention-heads": "8",
    "--num-query-groups": "2",
    "--kv-channels": "8",
    "--seq-length": "16",
    "--max-position-embeddings": "16",
    "--global-batch-size": "2",
    "--train-samples": "4",
    "--lr-decay-samples": "4",
    "--lr-warmup-samples": "1",
    "--train-iters": "2",
    "--lr-decay-iters": "2",
    "--eval-iters": "1",
    # Megatron asks TransformerEngine before it recomputes layer norms and MLA's up projections.
    "--recompute-modules": "mlp moe",
    "--lr-warmup-iters": "1",
    "--vocab-size": "128",
    "--make-vocab-size-divisible-by": "64",
    "--moe-ffn-hidden-size": "32",
    "--moe-shared-expert-intermediate-size": "32",
    "--q-lora-rank": "32",
    "--kv-lora-rank": "32",
    "--qk-head-dim": "8",
    "--qk-pos-emb-head-dim": "8",
    "--v-head-dim": "8",
}


def tiny_flags(script: str, changed: dict[str, str]) -> list[str]:
    """Return a script's flags with tiny sizes, with `changed` values, without what needs a GPU."""
    flags: list[list[str]] = []
    for word in shlex.split(script):
        if word.startswith("--"):
            flags.append([word])
        else:
            flags[-1].append(word)
    unknown = changed.keys() - {flag for flag, *_ in flags}
    assert not unknown, unknown
    values = {**TINY, **changed}
    kept = [
        [flag, *values[flag].split()] if flag in values else [flag, *given]
        for flag, *given in flags
        if flag not in NOT_HERE
    ]
    return [word for words in kept for word in words]
