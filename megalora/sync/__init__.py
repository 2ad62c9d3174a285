"""Adapters of a running model handed to a server of inference, without the base."""

from megalora.sync.http import Http
from megalora.sync.sglang import SGLangClient
from megalora.sync.versions import VersionedDirectory
from megalora.sync.vllm import VLLMClient

# `sync.tensors.RunningAdapters` imports Megatron, which `megalora.cpu` may have to come before.
__all__ = ["Http", "SGLangClient", "VLLMClient", "VersionedDirectory"]
