"""`needle`: numbers hidden in a long text, as in RULER's needle tasks (arXiv 2404.06654, section 3.1)."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import ClassVar

import numpy as np

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import need_file, option
from minikv_jax.evaluation.tasks.retrieval import Episode, Retrieval, digits, haystack, names

KINDS = ("single", "multikey", "multivalue")


@dataclasses.dataclass(frozen=True)
class Needle(Retrieval):
    """Retrieves numbers hidden in a text: one ("single"), one of `needles` ("multikey"), or all ("multivalue").

    The first number asked for stands at the depth of the case, and other numbers at random depths. The numbers of
    "multivalue" share one name.
    """

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "numbers hidden in noise or in a text, by depth and length"

    kind: str = option(f"one of {', '.join(KINDS)}", "single")
    needles: int = option("numbers in the text, unless single", 4, parse=int)
    haystack: pathlib.Path | None = option("a UTF-8 text to hide them in, instead of noise", None, parse=pathlib.Path)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r}: expected one of {', '.join(KINDS)}")
        at_least(1, needles=self.needles)
        if self.haystack is not None:
            need_file(self.haystack)

    def episode(self, rng: np.random.Generator, depth: float) -> Episode:
        count = 1 if self.kind == "single" else self.needles
        keys = names(rng, count)
        if self.kind == "multivalue":
            keys = [keys[0] for _ in range(count)]
        values = [digits(rng, 7) for _ in range(count)]
        depths = [depth, *rng.random(count - 1)]
        facts = [
            (place, f"The special number of {key} is {value}.")
            for place, key, value in zip(depths, keys, values, strict=True)
        ]
        references = values[:1] if self.kind == "multikey" else [values[index] for index in np.argsort(depths)]
        plural = len(references) > 1
        asked = f"the special number{'s' if plural else ''} of {keys[0]}"
        return Episode(
            "A text follows in which special numbers are hidden. Keep them in mind: you will be asked for them.",
            haystack(self.haystack, rng),
            facts,
            f"What {'are all' if plural else 'is'} {asked} that the text mentions?",
            f"{asked[0].upper()}{asked[1:]} {'are' if plural else 'is'}",
            " " + ", ".join(references),
            tuple(references),
        )
