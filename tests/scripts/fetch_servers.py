"""Fetch what reads adapters in vLLM and SGLang: the Python files of their wheels, nothing else.

`make servers` runs it: python tests/scripts/fetch_servers.py DIRECTORY. The wheels, 375 MB, are
downloaded once and dropped; 30 MB of source stay.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# Package, version and what of it is read.
WHEELS = {
    "vllm": (
        "0.33.0",
        (
            *("vllm/lora/", "vllm/model_executor/models/", "vllm/model_executor/utils.py"),
            "vllm/entrypoints/openai/completion/protocol.py",
            "vllm/entrypoints/serve/lora/protocol.py",
        ),
    ),
    "sglang": (
        "0.5.23",
        (
            *("sglang/srt/lora/", "sglang/srt/layers/utils/", "sglang/srt/models/"),
            *("sglang/srt/utils/common.py", "sglang/srt/managers/io_struct.py"),
            "sglang/srt/sampling/sampling_params.py",
        ),
    ),
}


def main(directory: Path) -> None:
    """Fill a directory with `PACKAGE-VERSION` folders of those that are not whole yet."""
    for package, (version, wanted) in WHEELS.items():
        place = directory / f"{package}-{version}"
        if all((place / name).exists() for name in wanted):
            continue
        with tempfile.TemporaryDirectory() as downloads:
            words = ["download", "--no-deps", "--only-binary", ":all:", "-d", downloads]
            requirement = f"{package}=={version}"
            subprocess.run([sys.executable, "-m", "pip", *words, requirement], check=True)
            [wheel] = Path(downloads).glob("*.whl")
            with zipfile.ZipFile(wheel) as files:
                names = [n for n in files.namelist() if n.endswith(".py") and n.startswith(wanted)]
                files.extractall(place, names)
        print(f"{place}: {len(names)} files")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
