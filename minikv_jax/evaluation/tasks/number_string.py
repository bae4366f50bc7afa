"""`number-string`: a long number with repeated digits, after InfiniteBench's Retrieve.Number (arXiv 2402.13718)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from minikv_jax.evaluation.tasks.retrieval import Episode, Retrieval, noise


@dataclasses.dataclass(frozen=True)
class NumberString(Retrieval):
    """Retrieves ten digits in runs of two or more, which a cache that blurs neighbouring tokens miscounts."""

    name: ClassVar[str] = "number-string"
    summary: ClassVar[str] = "a long number with repeated digits in noise"

    def episode(self, rng: np.random.Generator, depth: float) -> Episode:
        number = "".join(f"{digit}{digit}" for digit in rng.permutation(9)[:5] + 1)
        return Episode(
            "The following text holds one sequence of digits. Remember every digit of it.",
            noise(rng),
            [(depth, f"The sequence of digits is {number}. Again, it is {number}.")],
            "What is the sequence of digits in the text?",
            "The sequence of digits is",
            f" {number}",
            (number,),
        )
