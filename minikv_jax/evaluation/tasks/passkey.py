"""`passkey`: one five-digit key in a text that repeats itself, after Mohtashami and Jaggi (arXiv 2305.16300)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from minikv_jax.evaluation.tasks.retrieval import Episode, Retrieval, digits

_REFRAIN = ("The sky is wide.", "The river is slow.", "Clouds drift by.", "Then the road turns, and we walk on.")


@dataclasses.dataclass(frozen=True)
class Passkey(Retrieval):
    """Retrieves the one key from a text that repeats the same refrain."""

    name: ClassVar[str] = "passkey"
    summary: ClassVar[str] = "a five-digit key in a text that repeats itself"

    def episode(self, rng: np.random.Generator, depth: float) -> Episode:
        key = digits(rng, 5)
        return Episode(
            "Somewhere in the following text there is a pass key. Find it and remember it.",
            itertools.cycle(_REFRAIN),
            [(depth, f"The pass key is {key}. Remember it: {key} is the pass key.")],
            "What is the pass key?",
            "The pass key is",
            f" {key}",
            (key,),
        )
