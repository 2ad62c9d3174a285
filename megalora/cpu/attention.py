"""The name by which benchmarks know `megalora.mends.attention.CoreAttention`."""

from megalora.mends.attention import CoreAttention as CpuCoreAttention

__all__ = ["CpuCoreAttention"]
