#!/usr/bin/env bash
# Llama-3.1-8B with LoRA on one node of 8 GPUs of 80 GB.
#
#   HF_MODEL=/models/Llama-3.1-8B DATASET=train.jsonl OUT=out bash examples/train_llama3_8b.sh
#   CPU=1 bash examples/train_llama3_8b.sh          the same flags at toy size, on any machine
#
# Any further flags are passed on and win, such as --lora-rank 256 --train-iters 500.
#
# Layout: TP 2 with sequence parallelism, data parallel 4. Memory of one GPU in bf16: the frozen
# base 8.0e9 x 2 B / 2 = 8.0 GB; adapters at rank 32: 0.088e9 parameters, of which a GPU owns half,
# at most 16 B each = 0.7 GB; activations of 32 layers at 8192 tokens, recomputed: 32 x 8192 x 4096
# x 2 B / 2 = 1.1 GB, and logits 8192 x 128256 / 2 in fp32 = 2.1 GB.
# `megalora recommend --model llama-3.1-8b --rank 32` states learning rate and memory in detail.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/llama3-8b}
DATASET=${DATASET:-stdlib-docstrings}
export CUDA_DEVICE_MAX_CONNECTIONS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# A restart must not find the addresses of dead ranks in the store that torchrun shares.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

FLAGS=(
  --tensor-model-parallel-size 2 --sequence-parallel
  --attention-dropout 0 --hidden-dropout 0
  --dataset "$DATASET"
  --lr-decay-style constant --clip-grad 1.0
  --save "$OUT" --load "$OUT" --exit-signal-handler
  --log-interval 1 --eval-iters 0 --eval-interval 1000
)
if [[ "${CPU:-0}" == 1 ]]; then
  NPROC=${NPROC:-2}
  FLAGS+=(
    --cpu --num-layers 2 --hidden-size 64 --ffn-hidden-size 128 --num-attention-heads 4
    --group-query-attention --num-query-groups 2 --kv-channels 16 --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --max-position-embeddings 64 --byte-tokenizer
    --seq-length 64 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --save-interval 2
    --num-workers 0 --lora-rank 8 --lr 1e-3
  )
else
  NPROC=${NPROC:-8}
  FLAGS+=(
    --hf-model "${HF_MODEL:?set HF_MODEL to the directory of Llama-3.1-8B}"
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$HF_MODEL" --bf16
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 1
    --seq-length 8192 --micro-batch-size 1 --global-batch-size 32 --train-iters 1000
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
    --save-interval 100 --lora-rank 32 --lr 2.9e-4 --export-hf "$OUT/hf"
  )
fi
exec "${PYTHON:-python3}" -m torch.distributed.run --standalone --nproc-per-node "$NPROC" \
  --max-restarts "${MAX_RESTARTS:-3}" examples/pretrain_lora.py "${FLAGS[@]}" "$@"
