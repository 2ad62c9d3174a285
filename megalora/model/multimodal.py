"""The language model of a multimodal one, as config.json describes it."""

from collections.abc import Mapping
from typing import Any

from megalora.model.families import FAMILIES

TEXT = "text_config"


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a configuration says of the language model, fields beside one another.

    model_type and architectures stay those of the whole, and so does tie_word_embeddings where
    that is said of it. Raises ValueError where the part is no object, or of
    another family than the row's.
    """
    family = FAMILIES.get(str(config.get("model_type")))
    if not family or not family.text_type or TEXT not in config:
        return {**config}
    text = config[TEXT]
    if not isinstance(text, dict):
        raise ValueError(f"config.json {TEXT} is {text!r:.100}: must be an object")
    kinds = (family.text_type, f"{family.model_type}_text")
    if (kind := text.get("model_type", family.text_type)) not in kinds:
        raise ValueError(
            f"config.json {TEXT} has model_type {kind!r:.100}: a {family.model_type} is supported "
            f"with {family.text_type}"
        )
    whole = {name: value for name, value in config.items() if name != TEXT and value is not None}
    return {**text, **whole}


def as_text_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the language model alone, where a model has other parts."""
    family = FAMILIES.get(str(config.get("model_type")))
    if not family or not family.text_type:
        return {**config}
    text = FAMILIES[family.text_type]
    of_others = (TEXT, "vision_config", "model_type", "architectures")
    kept = {name: value for name, value in language_config(config).items() if name not in of_others}
    return {"model_type": text.model_type, "architectures": [text.architecture], **kept}


def as_untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of a model whose unembedding is its own, wherever that is said."""
    untied = {"tie_word_embeddings": False}
    text = config.get(TEXT)
    of_text = {TEXT: {**text, **untied}} if isinstance(text, dict) else {}
    return {**config, **untied, **of_text}
