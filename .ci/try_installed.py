"""Use an installed megalora: python try_installed.py EXAMPLES. The ops, then two steps of training.

Run from a directory that has no megalora in it.
"""

import itertools
import math
import re
import subprocess
import sys
from pathlib import Path

import torch

from megalora.ops import backend

# The smallest mixture of experts that training takes.
FLAGS = """
--cpu --byte-tokenizer --dataset stdlib-text --seq-length 32 --max-position-embeddings 32
--num-layers 1 --hidden-size 16 --ffn-hidden-size 32 --num-attention-heads 2 --swiglu
--disable-bias-linear --normalization RMSNorm --position-embedding-type rope
--untie-embeddings-and-output-weights --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 16
--moe-token-dispatcher-type alltoall --micro-batch-size 1 --global-batch-size 2 --train-iters 2
--log-interval 1 --eval-interval 9 --eval-iters 0 --lr 1e-2 --lora-rank 4
"""


def check_ops() -> int:
    """Compare the compiled ops, and their gradients, with plain torch; return how many sizes."""
    fused, reference = backend("fused"), backend("reference")
    sizes = list(itertools.product((1, 7), (8, 33), (1, 4), (torch.float32, torch.bfloat16)))
    for tokens, width, rank, dtype in sizes:
        torch.manual_seed(0)
        found = {}
        x, lora_A = torch.randn(tokens, width), torch.randn(rank, width)
        lora_B, dy = torch.randn(2 * width, rank), torch.randn(tokens, 2 * width)
        for name, ops in (("fused", fused), ("reference", reference)):
            x_, A, B, dy_ = (t.to(dtype, copy=True) for t in (x, lora_A, lora_B, dy))
            s = ops.shrink(x_, A)
            ds = ops.expand_dgrad(dy_, B, 2.0)
            y = torch.zeros_like(dy_)
            ops.expand_(y, s, B, 2.0)
            dx = torch.zeros_like(x_)
            ops.shrink_dgrad_(dx, ds, A)
            d_a = ops.shrink_wgrad(ds, x_)
            found[name] = [s, ds, y, ops.expand_wgrad(dy_, s, B, 2.0), dx, d_a]
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(*found.values(), rtol=tolerance, atol=tolerance)
    return len(sizes)


def train(examples: Path) -> list[float]:
    """Return the losses of two steps of an example."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, examples / "pretrain_lora.py", *FLAGS.split()]
    finished = subprocess.run(command, capture_output=True, text=True)
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", finished.stdout)]
    if finished.returncode or len(losses) != 2 or not all(map(math.isfinite, losses)):
        raise SystemExit(f"{finished.stdout}\n{finished.stderr}\nerror: no training")
    return losses


if __name__ == "__main__":
    print(f"ops and gradients as plain torch's at {check_ops()} sizes")
    print(f"two steps of training: losses {train(Path(sys.argv[1]))}")
