"""`common-words-extraction`: the most common words of a list, as in RULER (arXiv 2404.06654, section 3.3)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from minikv_jax.checks import at_least, integer
from minikv_jax.evaluation.task import option
from minikv_jax.evaluation.tasks.retrieval import Aggregation, Asked, distinct, largest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SYLLABLES = [first + second for first, second in itertools.product("bdfgklmnprstvz", "aeiou")]
_WORD_SYLLABLES = 3
_MOST_WORDS = len(_SYLLABLES) ** _WORD_SYLLABLES // 2  # of the common ones: there must be others


@dataclasses.dataclass(frozen=True)
class CommonWordsExtraction(Aggregation):
    """Asks for the most common words of a numbered list in random order.

    All common words are equally frequent, and so are the others, of which the list has as many as fit. The words are
    made of syllables and mean nothing.
    """

    name: ClassVar[str] = "common-words-extraction"
    summary: ClassVar[str] = "the most common words of a long list"

    words: int = option("common words, all of which are asked for", 10, parse=int)
    frequency: int = option("how often each common word occurs", 30, parse=int)
    other_frequency: int = option("how often each other word occurs, fewer times than that", 3, parse=int)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, other_frequency=self.other_frequency)
        at_least(self.other_frequency + 1, frequency=self.frequency)
        integer("words", self.words, 1, _MOST_WORDS)

    def asked(self, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, context: int) -> Asked:
        words = distinct(_words(rng))
        common = tuple(itertools.islice(words, self.words))
        placed = [(place, word) for word in common for place in rng.random(self.frequency)]

        def asked(others: int) -> Asked:
            while len(placed) < len(common) * self.frequency + others * self.other_frequency:
                word = next(words)
                placed.extend((place, word) for place in rng.random(self.other_frequency))
            used = placed[: len(common) * self.frequency + others * self.other_frequency]
            listed = " ".join(f"{number}. {word}" for number, (_, word) in enumerate(sorted(used), start=1))
            count = f"{len(common)} words" if len(common) > 1 else "word"
            return Asked(
                f"Here is a list of words. Some of them come up again and again: remember those.\n{listed}\n",
                f"What {'are' if len(common) > 1 else 'is'} the {count} that the list has most often?",
                f"The most common {'words are' if len(common) > 1 else 'word is'}",
                " " + ", ".join(common),
                common,
            )

        def fits(others: int) -> bool:
            prompt, question, _ = asked(others).encode(tokenizer, chat=self.chat_template)
            return len(prompt) + len(question) <= context

        if not fits(1):
            raise ValueError(
                f"context={context}: words={self.words} of frequency={self.frequency} leave no room for another word"
            )
        return asked(largest(fits))


def _words(rng: np.random.Generator) -> Iterator[str]:
    while True:
        yield "".join(rng.choice(_SYLLABLES, _WORD_SYLLABLES))
