#!/usr/bin/env bash
# Qwen3-30B-A3B with LoRA on one node of 8 GPUs of 80 GB.
#
#   HF_MODEL=/models/Qwen3-30B-A3B DATASET=train.jsonl OUT=out bash examples/train_qwen3_30b_a3b.sh
#   CPU=1 bash examples/train_qwen3_30b_a3b.sh      the same flags at toy size, on any machine
#
# Any further flags are passed on and win, such as --lora-rank 64 --train-iters 500.
#
# Layout: TP 2 with sequence parallelism, EP 8, expert TP 1, so data parallel 4 for attention and 1
# for experts: each GPU holds 16 of the 128 experts of every layer.
# Memory of one GPU in bf16: the frozen experts 29.0e9 x 2 B / 8 = 7.2 GB, the rest of the base
# 1.5e9 x 2 B / 2 = 1.5 GB; no gradients, no optimizer for either. Adapters at rank 32 (rank 4 an
# expert): 0.24e9 parameters, of which a GPU owns about 0.04e9, at most 16 B each = 0.6 GB.
# Activations with --recompute-granularity full: 48 layers x 4096 x 2048 x 2 B / 2 = 0.4 GB a
# microbatch, one layer's recomputation about 1 GB, logits 4096 x 151936 / 2 in fp32 = 1.2 GB.
# `megalora recommend --model qwen3-30b-a3b --rank 32` states learning rate and memory in detail.
# Most of 80 GB stays free: try a larger --micro-batch-size, or leave the --recompute flags out.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/qwen3-30b-a3b}
DATASET=${DATASET:-stdlib-docstrings}
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A restart must not find the addresses of dead ranks in the store that torchrun shares.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

FLAGS=(
  --expert-tensor-parallel-size 1 --sequence-parallel
  --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type none
  --attention-dropout 0 --hidden-dropout 0
  --dataset "$DATASET"
  --lr-decay-style constant --clip-grad 1.0
  --save "$OUT" --load "$OUT" --exit-signal-handler
  --log-interval 1 --eval-iters 0 --eval-interval 1000
)
if [[ "${CPU:-0}" == 1 ]]; then
  NPROC=${NPROC:-2}
  FLAGS+=(
    --cpu --tensor-model-parallel-size 2 --expert-model-parallel-size 2
    --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --kv-channels 16 --qk-layernorm --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --max-position-embeddings 64
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 32 --byte-tokenizer
    --seq-length 64 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --save-interval 2
    --num-workers 0 --lora-rank 8 --lr 1e-3
  )
else
  NPROC=${NPROC:-8}
  FLAGS+=(
    --hf-model "${HF_MODEL:?set HF_MODEL to the directory of Qwen3-30B-A3B}"
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$HF_MODEL"
    --tensor-model-parallel-size 2 --expert-model-parallel-size 8 --bf16
    --moe-grouped-gemm --moe-permute-fusion
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --seq-length 4096 --micro-batch-size 1 --global-batch-size 32 --train-iters 1000
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --save-interval 100 --lora-rank 32 --lr 5e-4 --export-hf "$OUT/hf"
  )
fi
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" \
  --max-restarts "${MAX_RESTARTS:-3}" examples/pretrain_lora.py "${FLAGS[@]}" "$@"
