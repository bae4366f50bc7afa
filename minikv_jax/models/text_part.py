"""The text model inside a Hugging Face checkpoint that also reads images."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

# Types of models with images, and of their text models if the config.json does not say.
TEXT_PARTS = {"gemma3": "gemma3_text", "llama4": "llama4_text", "mistral3": "mistral"}

_OUTSIDE = (
    "eos_token_id",
    "quantization_config",
    "tie_word_embeddings",
)  # keys beside the text part
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(?!lm_head)")
_IMAGES = re.compile(r"(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector)\.")
_Tensor = TypeVar("_Tensor")


def text_config(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the fields of the text model in the fields of a config.json, which may be those of a text model."""
    part, whole = given.get("text_config"), given.get("model_type")
    if not isinstance(part, Mapping) or whole not in TEXT_PARTS:
        return given
    outside = {key: given[key] for key in _OUTSIDE if given.get(key) is not None}
    return {"model_type": TEXT_PARTS[whole]} | dict(part) | outside


def text_tensors(tensors: Mapping[str, _Tensor]) -> dict[str, _Tensor]:
    """Returns the tensors of the text model under their names in a text checkpoint, without those of images."""
    if not any(map(_TEXT.match, tensors)):
        return dict(tensors)
    names = {name: _TEXT.sub("model.", name, count=1).removeprefix("language_model.") for name in tensors}
    return {names[name]: tensor for name, tensor in tensors.items() if not _IMAGES.match(name)}
