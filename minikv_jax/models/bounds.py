"""Types and limits of a model's settings, wide enough for any model and narrow enough to prevent overflow.

Schemas and dataclasses use them, so a value outside the limits is refused by name before anything is read or allocated.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict

MOST_WIDTH = 1 << 20
Layers = Annotated[int, Field(ge=1, le=1 << 12)]
Heads = Annotated[int, Field(ge=1, le=1 << 12)]
Width = Annotated[int, Field(ge=1, le=MOST_WIDTH)]
WidthOrZero = Annotated[int, Field(ge=0, le=MOST_WIDTH)]
Vocabulary = Annotated[int, Field(ge=1, le=1 << 24)]
Positions = Annotated[int, Field(ge=1, lt=1 << 31)]
Token = Annotated[int, Field(ge=0, lt=1 << 24)]
Epsilon = Annotated[float, Field(ge=1e-20, le=1)]
RopeBase = Annotated[float, Field(ge=1, le=1e20)]  # float32 holds its powers and their inverses
RopeFactor = Annotated[float, Field(ge=1e-6, le=1e6)]
Blend = Annotated[float, Field(ge=0, le=MOST_WIDTH)]
Scale = Annotated[float, Field(ge=0, le=1e6)]
Share = Annotated[float, Field(gt=0, le=1)]
Multiplier = Annotated[float, Field(ge=1e-6, le=1e6)]
Activation = Literal["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"]
LayerType = Literal["full_attention", "sliding_attention"]
AnyLayerType = Literal["full_attention", "sliding_attention", "chunked_attention"]

# Lists in JSON, tuples in Python.
Tokens = Annotated[tuple[Token, ...], Strict(False)]
LayerTypes = Annotated[tuple[LayerType, ...], Strict(False)]
AnyLayerTypes = Annotated[tuple[AnyLayerType, ...], Strict(False)]
LayerNumbers = Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 12)], ...], Strict(False)]
QueryTuning = Annotated[tuple[Positions, Multiplier], Strict(False)]
RopeFactors = Annotated[tuple[RopeFactor, ...], Strict(False)]


def _is_one(value: float | None) -> float | None:
    if value not in (None, 1):
        raise ValueError("1, which changes nothing: other values are not computed")
    return value


# Settings of other architectures, accepted only if they change nothing.
One = Annotated[float | None, AfterValidator(_is_one)]
Off = Literal[False] | None
