"""Recommend settings for a LoRA run by the rules of "LoRA Without Regret", and say what it costs.

shape = preset_shape("qwen3-30b-a3b")
print(recommend(shape, LoRAConfig(rank=32), tokens=10_000_000).table())
"""

from megalora.model.presets import preset_shape
from megalora.model.shape import ModelShape
from megalora.recommend.cli import add_parser
from megalora.recommend.costs import adapter_parameters, gpu_memory, step_flops
from megalora.recommend.layout import Layout
from megalora.recommend.recommendation import (
    Recommendation,
    recommend,
    recommend_for_args,
)
from megalora.recommend.rules import learning_rates

__all__ = [
    "Layout",
    "ModelShape",
    "Recommendation",
    "adapter_parameters",
    "add_parser",
    "gpu_memory",
    "learning_rates",
    "preset_shape",
    "recommend",
    "recommend_for_args",
    "step_flops",
]
