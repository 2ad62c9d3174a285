"""Language models that are another family's, in a model that also sees: Qwen-VL, Mistral Small.

What sees stays as it is. Rotary embeddings of Qwen-VL turn some features by a picture's rows and
columns: in a text all three positions of a token are one, and so is the embedding.
"""

from dataclasses import replace

from megalora.model.decoder_names import LANGUAGE
from megalora.model.families import mistral, qwen
from megalora.model.family import Family, Names

TEXTS = {family.model_type: family for family in (*qwen.FAMILIES, *mistral.FAMILIES)}


def _row(text_type: str, model_type: str, architecture: str, *beside: str) -> Family:
    """Return the row of a model whose language model is of a family that has one.

    beside: what is no part of it, as files before transformers 5 name it.
    """
    text = TEXTS[text_type]
    others = (*beside, *(f"model.{name}" for name in beside))
    return replace(
        text,
        model_type=model_type,
        architecture=architecture,
        names=Names(language=LANGUAGE, adapted=LANGUAGE, beside=others),
        text_type=text_type,
        rope_scalings=(*text.rope_scalings, "mrope"),
    )


FAMILIES = (
    _row("qwen2", "qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", "visual."),
    _row("qwen3", "qwen3_vl", "Qwen3VLForConditionalGeneration", "visual."),
    _row(
        "mistral",
        "mistral3",
        "Mistral3ForConditionalGeneration",
        "vision_tower.",
        "multi_modal_projector.",
    ),
)
