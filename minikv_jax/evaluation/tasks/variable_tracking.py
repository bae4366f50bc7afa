"""`variable-tracking`: chains of assignments hidden in a text, as in RULER (arXiv 2404.06654, section 3.2)."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import string
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import need_file, option
from minikv_jax.evaluation.tasks.retrieval import Aggregation, Asked, Episode, digits, distinct, fill_up, haystack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LETTERS = 5  # of a variable's name, and digits of its value


@dataclasses.dataclass(frozen=True)
class VariableTracking(Aggregation):
    """Asks for all variables of one chain: the first one gets a number, each other one the variable before it.

    The assignments of a chain stand at random places, in order. Other chains have other numbers.
    """

    name: ClassVar[str] = "variable-tracking"
    summary: ClassVar[str] = "all variables of a chain of assignments hidden in noise or in a text"

    chains: int = option("chains of assignments, one of which is asked for", 1, parse=int)
    hops: int = option("assignments from variable to variable in a chain", 4, parse=int)
    haystack: pathlib.Path | None = option("a UTF-8 text to hide them in, instead of noise", None, parse=pathlib.Path)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, chains=self.chains, hops=self.hops)
        if self.haystack is not None:
            need_file(self.haystack)

    def asked(self, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, context: int) -> Asked:
        length = self.hops + 1
        names = list(itertools.islice(distinct(_names(rng)), self.chains * length))
        values = list(itertools.islice(distinct(_values(rng)), self.chains))
        facts = []
        for number, value in enumerate(values):
            own = names[number * length : (number + 1) * length]
            assigned = [value, *(f"VAR {name}" for name in own[:-1])]
            texts = [f"VAR {name} = {source}." for name, source in zip(own, assigned, strict=True)]
            facts += zip(np.sort(rng.random(length)).tolist(), texts, strict=True)
        own = names[:length]
        question = f"Which {length} variables have the value {values[0]}, directly or through other variables?"
        episode = Episode(
            "A text follows in which assignments to variables are hidden. Keep track of the variables' values.",
            haystack(self.haystack, rng),
            facts,
            question,
            f"The variables with the value {values[0]} are VAR",
            "",
            (),
        )
        text = fill_up(tokenizer, episode, context, chat=self.chat_template).removesuffix(question)
        return Asked(text, question, episode.reply, " " + ", VAR ".join(own), tuple(own))


def _names(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield "".join(rng.choice([*string.ascii_uppercase], _LETTERS))


def _values(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield digits(rng, _LETTERS)
