"""`longeval`: the number in one of many named lines, after LongEval's line retrieval (Li et al. 2023, LongChat)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from minikv_jax.evaluation.tasks.retrieval import Episode, Retrieval, digits, names


@dataclasses.dataclass(frozen=True)
class LongEval(Retrieval):
    """Retrieves the number of a named line. All lines look alike, and only the question names the one that counts."""

    name: ClassVar[str] = "longeval"
    summary: ClassVar[str] = "the number in one of many named lines"

    def episode(self, rng: np.random.Generator, depth: float) -> Episode:
        key, *others = names(rng, 20000)

        def lines() -> Iterator[str]:
            for other in others:
                yield f"line {other}: the register holds <{digits(rng, 5)}>"

        number = digits(rng, 5)
        return Episode(
            "A list of named lines follows, each with the number in its register. You will be asked for one number.",
            lines(),
            [(depth, f"line {key}: the register holds <{number}>")],
            f"Which number does the register of line {key} hold?",
            f"The register of line {key} holds <",
            f"{number}>",
            (number,),
            "\n",
        )
