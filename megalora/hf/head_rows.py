"""The one rule for an adapter of the unembedding: it has the rows of its base's vocabulary."""

from collections.abc import Mapping

from megalora.hf.factors import LoRAFactors

HEAD = "lm_head"


def check_head_rows(
    factors: Mapping[str, LoRAFactors], vocab_size: int, padded_vocab_size: int | None = None
) -> None:
    """Raise ValueError where an adapter's lm_head has other rows than its base's vocabulary.

    As PEFT would. padded_vocab_size: for a base of which is not known how many of its rows are
    padding, those that it has at most.
    """
    most = padded_vocab_size or vocab_size
    if HEAD not in factors or not most:
        return
    rows = factors[HEAD].lora_B.shape[0]
    if not vocab_size <= rows <= most:
        wanted = f"{vocab_size:,}" if most == vocab_size else f"{vocab_size:,} to {most:,}"
        raise ValueError(
            f"adapter has {rows:,} rows of lm_head, its base's vocabulary {wanted}: it was trained "
            "on a base of another vocabulary: give that base, saved after its embeddings were "
            "resized, or train without lm_head"
        )
