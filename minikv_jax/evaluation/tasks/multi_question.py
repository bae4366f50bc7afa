"""`multi-question`: several questions about one text, compressed before or after they are known."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from minikv_jax.evaluation.task import Case, need_file, option
from minikv_jax.evaluation.tasks.retrieval import (
    Asked,
    Episode,
    GeneratedByDepth,
    TextThenQuestion,
    digits,
    fill_up,
    haystack,
    names,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class MultiQuestion(GeneratedByDepth, TextThenQuestion):
    """Asks for every one of the numbers hidden in a text, one at each depth.

    A method compresses the text before it knows the questions, once for all of them, or with `query_aware` the text and
    each question together. The tokens are the same.
    """

    name: ClassVar[str] = "multi-question"
    summary: ClassVar[str] = "several numbers hidden in one text, compressed before the questions are known"

    haystack: pathlib.Path | None = option("a UTF-8 text to hide them in, instead of noise", None, parse=pathlib.Path)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.haystack is not None:
            need_file(self.haystack)

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Case]:
        for sample, context in itertools.product(range(self.samples), self.context):
            yield from self._questions(tokenizer, sample, context)

    def _questions(self, tokenizer: PreTrainedTokenizerBase, sample: int, context: int) -> Iterator[Case]:
        rng = np.random.default_rng([self.seed, sample, context])
        keys = names(rng, len(self.depths))
        values = [digits(rng, 7) for _ in keys]
        asked = [f"the special number of {key}" for key in keys]
        episode = Episode(
            "A text follows in which special numbers are hidden. Keep them in mind: you will be asked for them.",
            haystack(self.haystack, rng),
            [
                (depth, f"The {name[4:]} is {value}.")
                for depth, name, value in zip(self.depths, asked, values, strict=True)
            ],
            f"What is {max(asked, key=len)} that the text mentions?",
            f"The {max(asked, key=len)[4:]} is",
            "",
            (),
        )
        text = fill_up(tokenizer, episode, context, chat=self.chat_template).removesuffix(episode.after)
        for depth, name, value in zip(self.depths, asked, values, strict=True):
            question = f"What is {name} that the text mentions?"
            one = Asked(text, question, f"The {name[4:]} is", f" {value}", (value,))
            label = f"{context} tokens, sample {sample}, number at depth {depth:g}"
            yield self.case(tokenizer, one, label, context, {"depth": depth, "sample": sample})
