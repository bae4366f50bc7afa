"""Reads the rotary settings of a Hugging Face config.json."""

from __future__ import annotations

import math
from typing import Any

from minikv_jax.models.config import RopeScaling
from minikv_jax.models.family import Family, Fields, RopeByLayerType, RopeFields


def rope_settings(family: Family, fields: Fields, head_dim: int, share: float | None) -> dict[str, Any]:
    """Returns the rotary values of a `ModelConfig`.

    They stand in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling`.

    Args:
      family: the model family.
      fields: the fields of the config.json.
      head_dim: channels per head.
      share: `partial_rotary_factor` beside the rotary settings, if the family reads it.

    Raises:
      ValueError: settings that contradict each other, lack a value, or are not computed for this family.
    """
    given = [_main(family, rope) for rope in (fields.rope_parameters, fields.rope_scaling) if rope is not None]
    first, *others = [_values(family, rope, fields, head_dim, share) for rope in given or [RopeFields()]]
    if others not in ([], [first]):
        raise ValueError(f"rope_parameters give {_text(first)}, and rope_scaling {_text(others[0])}; accepted: one")
    if family.rope_by_layer_type and isinstance(fields.rope_parameters, RopeByLayerType):
        local = fields.rope_parameters.sliding_attention or RopeFields()
        if _kind(local) != "default":
            raise ValueError(f"rope_parameters.sliding_attention has rope_type={_kind(local)!r}; accepted: 'default'")
        if local.rope_theta is not None:
            first["local_rope_theta"] = local.rope_theta
    return first


def _main(family: Family, rope: RopeFields | RopeByLayerType) -> RopeFields:
    """Returns the settings of the layers without a window."""
    if isinstance(rope, RopeFields):
        return rope
    if not family.rope_by_layer_type:
        raise ValueError("rope_parameters differ by type of layer; accepted: the same for all layers")
    return rope.full_attention or RopeFields()


def _kind(rope: RopeFields) -> str:
    kind = rope.rope_type or rope.type or "default"
    return "longrope" if kind == "su" else kind


def _text(values: dict[str, Any]) -> str:
    return f"rope_theta={values['rope_theta']}, {values['rope_scaling']}"


def _values(family: Family, rope: RopeFields, fields: Fields, head_dim: int, share: float | None) -> dict[str, Any]:
    share = _share(family, rope, share)
    rotated = head_dim if share is None else int(head_dim * share)
    theta = rope.rope_theta or fields.rope_theta or family.rope_theta
    values = {"rope_theta": theta, "rope_scaling": None, "rotary_dim": None if rotated == head_dim else rotated}
    kind, positions = _kind(rope), fields.max_position_embeddings
    if kind == "dynamic" and rope.alpha is not None:  # Hunyuan: a fixed base
        return values | {"rope_theta": theta * rope.alpha ** (rotated / (rotated - 2))}
    _check_needed(kind, rope)
    if kind != "default":
        original = rope.original_max_position_embeddings or positions
        if kind in ("llama3", "yarn", "longrope"):  # a value beside the rotary settings wins, as in transformers
            original = fields.original_max_position_embeddings or original
        scaling = values["rope_scaling"] = _SCALINGS[kind](rope, theta, rotated, original, positions)
        if kind in ("yarn", "dynamic"):
            longest = int(scaling.original_max_position_embeddings * scaling.factor)
            values["max_position_embeddings"] = max(positions, longest)
    return values


def _share(family: Family, rope: RopeFields, share: float | None) -> float | None:
    """Returns the share of rotated channels, if the family rotates a part of them."""
    if family.rotary_share is None:
        if rope.partial_rotary_factor not in (None, 1):
            raise ValueError(
                f"partial_rotary_factor is {rope.partial_rotary_factor}; accepted: 1, since {family.model_type} "
                "rotates all channels"
            )
        return None
    return rope.partial_rotary_factor or share or family.rotary_share


def _check_needed(kind: str, rope: RopeFields) -> None:
    """Raises ValueError if a value that a kind of scaling needs is missing."""
    needed = {
        "linear": ["factor"],
        "llama3": ["factor", "low_freq_factor", "high_freq_factor"],
        "dynamic": ["factor"],
        "longrope": ["short_factor", "long_factor"],
    }
    if missing := [name for name in needed.get(kind, []) if not getattr(rope, name)]:
        raise ValueError(f"rope_type={kind!r} needs {', '.join(missing)} in the rope parameters")


def _linear(rope: RopeFields, theta: float, rotated: int, original: int, positions: int) -> RopeScaling:
    del theta, rotated, original, positions
    return RopeScaling(rope_type="linear", factor=rope.factor or 1.0)


def _llama3(rope: RopeFields, theta: float, rotated: int, original: int, positions: int) -> RopeScaling:
    del theta, rotated, positions
    names = ("factor", "low_freq_factor", "high_freq_factor")
    values: dict[str, Any] = {name: getattr(rope, name) for name in names}
    return RopeScaling(rope_type="llama3", original_max_position_embeddings=original, **values)


def _dynamic(rope: RopeFields, theta: float, rotated: int, original: int, positions: int) -> RopeScaling:
    del theta, rotated, original  # transformers reads no original context here
    return RopeScaling(rope_type="dynamic", factor=rope.factor or 1.0, original_max_position_embeddings=positions)


def _longrope(rope: RopeFields, theta: float, rotated: int, original: int, positions: int) -> RopeScaling:
    del theta, rotated
    factor = rope.factor or positions / original
    size = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeScaling(
        rope_type="longrope",
        original_max_position_embeddings=original,
        factors=rope.short_factor,
        long_factors=rope.long_factor,
        attention_factor=rope.attention_factor or size,
    )


def _yarn(rope: RopeFields, theta: float, rotated: int, original: int, positions: int) -> RopeScaling:
    """Computes YaRN's blended range of frequencies and its factor of the attention (arXiv 2309.00071, section 3)."""
    factor = rope.factor or positions / original

    def size(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    def number(turns: float) -> float:
        """The frequency that turns this often over the original context."""
        return rotated * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = number(rope.beta_fast or 32.0), number(rope.beta_slow or 1.0)
    if rope.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotated - 1)
    both = rope.mscale and rope.mscale_all_dim
    derived = size(rope.mscale or 1.0) / size(rope.mscale_all_dim or 1.0) if both else size(1.0)
    return RopeScaling(
        rope_type="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=rope.attention_factor or derived,
        first_blended=float(first),
        last_blended=float(last if last != first else first + 0.001),
    )


_SCALINGS = {"linear": _linear, "llama3": _llama3, "dynamic": _dynamic, "longrope": _longrope, "yarn": _yarn}
