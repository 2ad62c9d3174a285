"""Small honest files to change: bases, adapters, data; nothing here needs transformers."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from megalora.hf.cuts import Placement, Shard
from megalora.hf.factors import LoRAFactors
from megalora.hf.peft import write_adapter
from megalora.hf.weights import Weights

LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": False,
}
MOE = {
    **{name: value for name, value in LLAMA.items() if name != "rope_scaling"},
    "model_type": "qwen3_moe",
    "head_dim": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 6,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
}
FACTORS = {
    "model.layers.0.self_attn.q_proj": (2, 8, 8),
    "model.layers.1.self_attn.k_proj": (2, 8, 4),
    "model.layers.1.mlp.down_proj": (3, 12, 8),
    "lm_head": (2, 8, 10),
}
ROWS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "be [brief] {so}"}]},
            {"role": "user", "content": "wie geht es? 你好", "weight": 0},
            {"role": "assistant", "content": "gut"},
        ],
        "system": None,
        "documents": None,
    },
    {"messages": '[{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]'},
]
TEXTS = [{"text": "once upon a time"}, {"text": "the [end] {1}"}]


def write_base(directory: Path, config: dict[str, object], shards: int = 1) -> Path:
    """Write a base with all tensors that its config.json promises."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    expected = Weights(config, Placement(Shard(), Shard(), Shard())).expected()
    tensors = {name: torch.randn(size, generator=generator) for name, size in expected.items()}
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    place = {name: files[n % shards] for n, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: t for n, t in tensors.items() if place[n] == file}, directory / file)
    index = {"metadata": {"total_size": 1}, "weight_map": place}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_peft(directory: Path) -> Path:
    """Write an adapter of four modules of `LLAMA`, of two ranks and two scales."""
    generator = torch.Generator().manual_seed(1)
    factors = {
        name: LoRAFactors(
            torch.randn(rank, num_in, generator=generator),
            torch.randn(num_out, rank, generator=generator),
            2.0 if rank == 2 else 1.0,
        )
        for name, (rank, num_in, num_out) in FACTORS.items()
    }
    write_adapter(directory, factors, base_model_name="tiny", num_layers=2)
    return directory


def write_stacked_peft(directory: Path) -> Path:
    """Write an adapter whose experts are stacked in 3-D factors."""
    generator = torch.Generator().manual_seed(2)
    sizes = {"gate_proj": (8, 6), "up_proj": (8, 6), "down_proj": (6, 8)}
    factors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{projection}": LoRAFactors(
            torch.randn(2, num_in, generator=generator),
            torch.randn(num_out, 2, generator=generator),
            2.0,
        )
        for layer in range(2)
        for expert in range(3)
        for projection, (num_in, num_out) in sizes.items()
    }
    write_adapter(
        directory,
        factors,
        base_model_name="tiny",
        format="peft-3d",
        num_layers=2,
        num_experts=3,
        moe_layers=range(2),
    )
    return directory


def write_rows(directory: Path, rows: list[dict[str, object]]) -> Path:
    """Write JSON lines."""
    directory.mkdir(parents=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (directory / "data.jsonl").write_text("".join(lines))
    return directory
