"""The packages that matter to a run: which are here, where, and what a missing one would give."""

import importlib.metadata
from collections.abc import Iterable
from typing import NamedTuple

from megalora.installed import place_of, version_in
from megalora.printable import printable


class Package(NamedTuple):
    """A package as pip and as Python name it.

    names: of the distribution, by which its version is asked for; the first that is found counts.
    module: what Python imports; empty where it lies within another package.
    gives: what it is here for.
    """

    names: tuple[str, ...]
    module: str
    gives: str
    needed: bool = False


PACKAGES = (
    Package(("torch",), "torch", "all tensors", needed=True),
    Package(("megatron-core",), "megatron.core", "models and training", needed=True),
    Package(("numpy",), "numpy", "data and checkpoints", needed=True),
    Package(("safetensors",), "safetensors", "files of Hugging Face", needed=True),
    Package(
        ("datasets",), "datasets", "--dataset with parquet or a name of Hugging Face", needed=True
    ),
    Package(("google-re2",), "re2", "patterns of PEFT's target_modules", needed=True),
    Package(("psutil",), "psutil", "who holds a checkpoint's lock", needed=True),
    Package(("absl-py",), "absl", "megatron-core's tensors from others' checkpoints", needed=True),
    Package(("transformers",), "transformers", "Hugging Face tokenizers and chat templates"),
    Package(("tokenizers",), "tokenizers", "Hugging Face tokenizers"),
    Package(("peft",), "peft", "loading exported adapters beside transformers"),
    Package(
        ("transformer-engine",),
        "transformer_engine",
        "norm and linear in one, fused attention, grouped GEMM, FP8",
    ),
    Package(("transformer-engine-torch",), "", "TransformerEngine's kernels"),
    Package(
        ("apex",),
        "apex",
        "gradient_accumulation_fusion and masked_softmax_fusion, where NVIDIA's is built from its "
        "source: on the package index apex is another project",
    ),
    Package(("triton",), "triton", "torch.compile and Megatron's Triton kernels on a GPU"),
    Package(("flash-attn",), "flash_attn", "attention that TransformerEngine can choose"),
    Package(("flash-linear-attention",), "fla", "kernels of gated delta nets"),
    Package(("mamba-ssm",), "mamba_ssm", "kernels of Mamba layers"),
    Package(("einops",), "einops", "Mamba layers"),
    Package(
        ("nvidia-resiliency-ext",),
        "nvidia_resiliency_ext",
        "Megatron's default strategy of --async-save",
    ),
    Package(
        ("nvidia-nccl-cu13", "nvidia-nccl-cu12"), "nvidia.nccl", "collectives, where pip brought it"
    ),
    Package(
        ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"), "nvidia.cudnn", "cuDNN, where pip brought it"
    ),
)


def describe(package: Package) -> dict[str, object]:
    """Return the version and the place of a package, or what is wrong with it; imports nothing."""
    found: dict[str, object] = {"gives": package.gives, "needed": package.needed}
    if not package.module:
        return {**found, "version": _version(package.names)}
    try:
        place = place_of(package.module)
    except Exception as error:  # whatever a stranger's module does where it is looked for
        return {**found, "version": None, "problem": printable(error)}
    version = _version(package.names)
    if place is None:
        return {**found, "version": None, **_gone(version)}
    # A checkout of Megatron says its own, which pip knows nothing of.
    written = ".".join(map(str, version_in(place)))
    found |= {"version": version or written or "of unknown version", "place": str(place)}
    if package.module == "apex" and not (place / "multi_tensor_apply").is_dir():
        found["problem"] = "this is not NVIDIA's apex but another project of that name: remove it"
    return found


def _gone(version: str | None) -> dict[str, str]:
    problem = f"version {version} is listed as installed, but its files are gone: install it again"
    return {} if version is None else {"problem": problem}


def _version(names: Iterable[str]) -> str | None:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except Exception:  # not there, or its metadata is damaged
            continue
    return None
