"""`Family`: what sets one model family apart from the others. Each file in `families/` defines one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from minikv_jax import checks

LAYER_TYPES = ("full_attention", "sliding_attention")
SWITCHES = ("attention_bias", "mlp_bias")

# The sliding window, and the type of every layer (None: the window holds in all of them).
Windows = tuple[int | None, tuple[str, ...] | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, as config files and checkpoints describe it.

    Attributes:
      model_type: its name in a Hugging Face config.json.
      defaults: the fields that transformers fills in when a config.json leaves them out. Fields that all families
        share need no entry (`huggingface.config_from_hf`).
      switches: those of `SWITCHES` that transformers reads for this family. It ignores the others in a config.json.
      qkv_bias: the q, k and v projections always have biases; o has none.
      qk_norm: queries and keys are normalised per head before the rotation.
      windows: reads the sliding window and the layer types from the fields of a config.json, with defaults filled in.
        None if the architecture has no windows.
      gguf_architecture: its `general.architecture` in a GGUF file. Families may share one: a file with a sliding window
        then belongs to the family that has `windows`.
      gguf_interleaved: GGUF files store the two halves of every q and k head channel by channel in turn, because
        llama.cpp rotates neighbouring channels in this architecture.
    """

    model_type: str
    defaults: Mapping[str, Any]
    switches: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    windows: Callable[[Mapping[str, Any]], Windows] | None = None
    gguf_architecture: str | None = None
    gguf_interleaved: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown switch."""
        for switch in self.switches:
            checks.choice("switches entry", switch, SWITCHES)
