"""Recommend settings for a LoRA run by the rules of "LoRA Without Regret", and say what it costs.

shape = ModelShape.from_preset("qwen3-30b-a3b")
print(recommend(shape, LoRAConfig(rank=32), tokens=10_000_000).table())
"""

from megalora.recommend.cli import add_parser
from megalora.recommend.costs import Layout, adapter_parameters, gpu_memory, step_flops
from megalora.recommend.recommendation import (
    Recommendation,
    recommend,
    recommend_for_args,
)
from megalora.recommend.rules import learning_rates
from megalora.recommend.shapes import ModelShape

__all__ = [
    "Layout",
    "ModelShape",
    "Recommendation",
    "adapter_parameters",
    "add_parser",
    "gpu_memory",
    "learning_rates",
    "recommend",
    "recommend_for_args",
    "step_flops",
]
