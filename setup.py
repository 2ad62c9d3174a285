"""Build csrc into megalora/_C.so: the CPU ops always, the CUDA ops where nvcc is found.

The library loads in every torch from OLDEST_TORCH on, whichever it is built beside.
MEGALORA_CUDA=0 leaves CUDA out, MEGALORA_CUDA=1 makes a missing nvcc an error.
MEGALORA_CUDA_ARCH=90a builds for that architecture only. MEGALORA_LABEL=1 adds to the version what
the library is for, as in 0.2.0+cuda13.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
OLDEST_TORCH = (2, 11)
# Besides torch.
REQUIRED = [
    "megatron-core>=0.19,<0.21",
    "datasets",
    "safetensors",
    "google-re2",
    "psutil",
    "absl-py",
]
# These need nothing compiled, and so no torch.
WITHOUT_TORCH = {"sdist", "egg_info"}
# H100, H200 and B200 by their own instruction sets; A100, and by PTX whatever comes, by the oldest.
GENCODE = {
    "80": "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "90a": "-gencode=arch=compute_90a,code=sm_90a",
    "100a": "-gencode=arch=compute_100a,code=sm_100a",
}


def notice(text: str) -> None:
    """Say on the terminal what is built; setuptools hides ordinary output of pip builds."""
    print(f"megalora: {text}", flush=True)


def version() -> str:
    """Return the version, which megalora/__init__.py alone says."""
    text = (ROOT / "megalora/__init__.py").read_text()
    return re.findall(r'^__version__ = "(.+)"$', text, re.MULTILINE)[0]


def check_torch() -> None:
    """Raise SystemExit where there is no torch to build beside."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(
            "megalora is compiled beside a torch, and none is here: `pip install torch setuptools "
            "wheel ninja` first, then give pip --no-build-isolation, without which it hides the "
            "torch that is installed"
        )
    import torch

    major, minor = map(int, torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        raise SystemExit(
            f"megalora needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer, and "
            f"{torch.__version__} is installed: install a newer one first"
        )


def cuda_home() -> Path | None:
    """Return the folder that has both bin/nvcc and the headers.

    nvcc may be a link in /usr/local/bin, whose parent torch would take for CUDA_HOME.
    """
    candidates = [
        Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ
    ]
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates += [Path(nvcc).resolve().parent.parent, Path(nvcc).parent.parent]
    candidates.append(Path("/usr/local/cuda"))
    for home in candidates:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def nvcc_major(home: Path) -> str:
    """Return the major version that nvcc says it has, as in "release 13.0"."""
    said = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", said)
    return release[1] if release else "unknown"


def wanted_cuda() -> Path | None:
    """Return the CUDA toolkit to build with, None to build for the CPU only."""
    wish = os.environ.get("MEGALORA_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"MEGALORA_CUDA is {wish!r}: use 0 to forbid CUDA, 1 to require it")
    if wish == "0":
        notice("CPU ops only, because MEGALORA_CUDA=0")
        return None
    architectures()
    import torch

    if torch.version.cuda is None:
        if wish == "1":
            raise SystemExit(
                "MEGALORA_CUDA=1 but this torch is built without CUDA: install one that is"
            )
        notice("CPU ops only: this torch is built without CUDA")
        return None
    home = cuda_home()
    if home is None and wish == "1":
        raise SystemExit("MEGALORA_CUDA=1 but no nvcc with headers was found: set CUDA_HOME")
    if home is None:
        notice("CPU ops only: no nvcc with headers was found (set CUDA_HOME to build CUDA ops)")
        return None
    if home is not None and (found := nvcc_major(home)) != torch.version.cuda.split(".")[0]:
        mismatch = f"{home} has CUDA {found}, this torch is built with CUDA {torch.version.cuda}"
        if wish == "1":
            raise SystemExit(f"MEGALORA_CUDA=1 but {mismatch}: set CUDA_HOME to one that matches")
        notice(f"CPU ops only: {mismatch} (set CUDA_HOME to one that matches)")
        return None
    return home


def architectures() -> list[str]:
    """Return the architectures to build for: all, or the one that MEGALORA_CUDA_ARCH names."""
    wish = os.environ.get("MEGALORA_CUDA_ARCH", "")
    if wish and wish not in GENCODE:
        raise SystemExit(f"MEGALORA_CUDA_ARCH is {wish!r}: use one of {', '.join(GENCODE)}")
    return [wish] if wish else list(GENCODE)


def sources_in(*folders: str) -> list[str]:
    """Return the C++ and CUDA sources of some folders, in a fixed order."""
    files = (path for folder in folders for path in Path(folder).iterdir())
    return sorted(str(path) for path in files if path.suffix in (".cpp", ".cu"))


def extension(home: Path | None):
    """Return the extension of all sources that can be compiled here."""
    if shutil.which(os.environ.get("CXX", "c++")) is None and shutil.which("g++") is None:
        raise SystemExit(
            "megalora needs a C++20 compiler and found none: install g++ (apt-get install g++) "
            "or clang, or set CXX"
        )
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # read by torch.utils.cpp_extension on import
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = sources_in("csrc", "csrc/cpu")
    # By torch's stable ABI: nothing of what changes between its versions.
    target = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
    oldest = "-DMEGALORA_OLDEST_TORCH={}.{}".format(*OLDEST_TORCH)
    # libtorch has no symbol that is asked of it, but brings the part for CUDA where there is one.
    torch = ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]
    flags = {"cxx": ["-O3", "-g0", "-std=c++20", "-Wno-psabi", "-fvisibility=hidden"]}
    flags["cxx"] += [target, oldest]
    if home is None:
        built = CppExtension(
            "megalora._C", sources, extra_compile_args=flags, extra_link_args=torch
        )
        built.libraries = []
        return built
    wanted = [f"sm_{name}" for name in architectures()]
    notice(f"CPU ops, and CUDA ops for {', '.join(wanted)} with {home}/bin/nvcc")
    sources += sources_in("csrc/cuda")
    flags["cxx"].append(f"-DMEGALORA_ARCHITECTURES={','.join(wanted)}")
    flags["nvcc"] = ["-O3", "-std=c++20", target, *(GENCODE[a] for a in architectures())]
    built = CUDAExtension("megalora._C", sources, extra_compile_args=flags, extra_link_args=torch)
    built.libraries = ["cudart"]
    return built


def build_command():
    """Return torch's build command, asked for a plain _C.so because no Python symbol is in it."""
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension.with_options(no_python_abi_suffix=True)


def built_here() -> dict[str, object]:
    """Return what setup() is told of the library and of the version, which may name it."""
    if WITHOUT_TORCH & set(sys.argv):
        return {"version": version()}
    check_torch()
    home = wanted_cuda()
    # For the name of a wheel that others install; pip wants a source's own version unchanged.
    label = f"+cuda{nvcc_major(home)}" if home else "+cpu"
    return {
        "version": version() + (label if "MEGALORA_LABEL" in os.environ else ""),
        "ext_modules": [extension(home)],
        "cmdclass": {"build_ext": build_command()},
        # Nothing of Python is in it: any Python from this one on.
        "options": {"bdist_wheel": {"py_limited_api": "cp312"}},
    }


os.chdir(ROOT)
setup(
    name="megalora",
    description="LoRA for NVIDIA Megatron, in every parallel layout, exchanged with Hugging Face",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The megalora maintainers",
    license="Apache-2.0",
    keywords=["LoRA", "Megatron", "fine-tuning", "mixture of experts"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["megalora", "megalora.*"]),
    python_requires=">=3.12",
    install_requires=["torch>={}.{}".format(*OLDEST_TORCH), *REQUIRED],
    extras_require={
        "hf": ["transformers", "peft"],
        "dev": [
            "pytest",
            "pytest-xdist",
            "hypothesis",
            "ruff==0.17.6",
            "pyright[nodejs]==1.1.414",
            "matplotlib",
            "tensorboard",
            "wandb",
            "trl",
        ],
        "docs": ["sphinx", "myst-parser", "furo"],
    },
    entry_points={"console_scripts": ["megalora = megalora.__main__:main"]},
    **built_here(),
)
