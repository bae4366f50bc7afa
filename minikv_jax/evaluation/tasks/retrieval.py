"""Bases of the generated tasks: facts hidden in filler, over a grid of lengths and perhaps depths."""

from __future__ import annotations

import abc
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import (
    Case,
    around,
    encode_pair,
    encode_prompt,
    need_tokenizer,
    numbers,
    option,
    read_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_SLACK = 8  # extra tokens that a greedy answer may have


class Episode(NamedTuple):
    """One question about a text of any length.

    Attributes:
      before, after: the instruction before the filler and the question after it.
      filler: pieces of text, as many as needed.
      facts: the hidden pieces, each with its depth in the filler (0 is the beginning, 1 the end).
      reply: the opening of the answer.
      answer: the rest of the answer.
      references: what a generated answer should contain.
    """

    before: str
    filler: Iterator[str]
    facts: list[tuple[float, str]]
    after: str
    reply: str
    answer: str
    references: tuple[str, ...]
    separator: str = " "


@dataclasses.dataclass(frozen=True)
class Generated(abc.ABC):
    """Base class with a grid of prompt lengths."""

    context: tuple[int, ...] = option("prompt tokens, one or more lengths", (4096,), parse=numbers(int))
    samples: int = option("cases per length, and per depth if there are depths", 1, parse=int)
    limit: int | None = option("take the first N cases", None, parse=int)
    seed: int = option("of the generated text", 0, parse=int)
    chat_template: bool = option("put the prompt into the model's chat template", True, parse=bool)

    @abc.abstractmethod
    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Case]:
        """Makes the cases, at most `limit` of which are used."""

    def __post_init__(self) -> None:
        at_least(1, samples=self.samples, limit=self.limit, context=min(self.context))
        at_least(0, seed=self.seed)

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        if max(self.context) > positions:
            raise ValueError(f"context={max(self.context)} exceeds the model's {positions} positions")
        return list(itertools.islice(self.make(need_tokenizer(tokenizer)), self.limit))

    def score(self, case: Case, text: str) -> float:
        """Fraction of the references that the text contains, ignoring case (RULER, arXiv 2404.06654)."""
        return float(np.mean([reference.lower() in text.lower() for reference in case.answers]))


class Asked(NamedTuple):
    """A text and a question after it.

    Attributes:
      text: the instruction and the text.
      question: the question.
      reply: the opening of the answer.
      answer: the rest of the answer.
      references: what a generated answer should contain.
    """

    text: str
    question: str
    reply: str
    answer: str
    references: tuple[str, ...]

    def encode(self, tokenizer: PreTrainedTokenizerBase, *, chat: bool) -> list[tuple[int, ...]]:
        """Encodes the text, the question with the opening of its answer, and the rest of that."""
        before, after = around(tokenizer, chat=chat)
        parts = (before + self.text, f"{self.question}{after}{self.reply}", self.answer)
        return [tuple(tokenizer.encode(part, add_special_tokens=False)) for part in parts]


@dataclasses.dataclass(frozen=True)
class TextThenQuestion(Generated):
    """Base class of tasks whose text is compressed before the question is known, or with it."""

    query_aware: bool = option("compress the text together with the question", False, parse=bool)

    def case(
        self, tokenizer: PreTrainedTokenizerBase, asked: Asked, name: str, context: int, tags: dict[str, Any]
    ) -> Case:
        """Makes a case of a text and a question. The tokens are the same with `query_aware` and without."""
        prompt, question, continuation = asked.encode(tokenizer, chat=self.chat_template)
        return Case(
            name,
            prompt + question if self.query_aware else prompt,
            continuation,
            asked.references,
            max_new_tokens=len(continuation) + ANSWER_SLACK * len(asked.references),  # lists come in many forms
            group=str(context),
            tags={"context": context} | tags,
            question=() if self.query_aware else question,
        )


@dataclasses.dataclass(frozen=True)
class Aggregation(TextThenQuestion):
    """Base class of tasks with one question per text, about all of it; subclasses define it (`asked`)."""

    @abc.abstractmethod
    def asked(self, tokenizer: PreTrainedTokenizerBase, rng: np.random.Generator, context: int) -> Asked:
        """Makes a text and a question of at most `context` tokens, with all random choices from `rng`."""

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Case]:
        for sample, context in itertools.product(range(self.samples), self.context):
            asked = self.asked(tokenizer, np.random.default_rng([self.seed, sample, context]), context)
            yield self.case(tokenizer, asked, f"{context} tokens, sample {sample}", context, {"sample": sample})


@dataclasses.dataclass(frozen=True)
class GeneratedByDepth(Generated):
    """Base class with a grid of prompt lengths and of depths at which a fact stands."""

    depths: tuple[float, ...] = option(
        "where the fact stands, 0 to 1", (0.0, 0.25, 0.5, 0.75, 1.0), parse=numbers(float)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths}: expected numbers from 0 to 1")


@dataclasses.dataclass(frozen=True)
class Retrieval(GeneratedByDepth):
    """Base class of tasks with one question per prompt; subclasses define it (`episode`)."""

    @abc.abstractmethod
    def episode(self, rng: np.random.Generator, depth: float) -> Episode:
        """Makes a question at a depth from 0 to 1, with all random choices from `rng`."""

    def make(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Case]:
        for point in itertools.product(range(self.samples), self.context, self.depths):
            yield self._case(tokenizer, *point)

    def _case(self, tokenizer: PreTrainedTokenizerBase, sample: int, context: int, depth: float) -> Case:
        rng = np.random.default_rng([self.seed, sample, context, round(depth * 10000)])
        episode = self.episode(rng, depth)
        text = fill_up(tokenizer, episode, context, chat=self.chat_template)
        prompt, continuation = encode_pair(
            tokenizer, text, episode.answer, chat=self.chat_template, reply=episode.reply
        )
        return Case(
            f"{context} tokens, depth {depth:g}, sample {sample}",
            prompt,
            continuation,
            episode.references,
            max_new_tokens=len(continuation) + ANSWER_SLACK,
            group=str(context),
            tags={"context": context, "depth": depth, "sample": sample},
        )


def fill_up(tokenizer: PreTrainedTokenizerBase, episode: Episode, tokens: int, *, chat: bool) -> str:
    """Builds the longest text of complete pieces whose prompt has at most `tokens` tokens."""
    pieces: list[str] = []

    def text(count: int) -> str:
        pieces.extend(itertools.islice(episode.filler, max(count - len(pieces), 0)))
        if len(pieces) < count:
            raise ValueError(f"the haystack is too short to fill {tokens} tokens")
        filled = pieces[:count]
        for depth, fact in sorted(episode.facts, reverse=True):
            filled.insert(round(depth * count), fact)
        return f"{episode.before}\n{episode.separator.join(filled)}\n{episode.after}"

    def fits(count: int) -> bool:
        return len(encode_prompt(tokenizer, text(count), chat=chat, reply=episode.reply)) <= tokens

    if not fits(0):
        raise ValueError(f"context={tokens}: the question alone has more tokens")
    return text(largest(fits))


def largest(fits: Callable[[int], bool]) -> int:
    """Finds the largest number that fits; 0 does, and every number below one that fits."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


_SUBJECTS = ("the gardener", "a clerk", "the old ferry", "her cousin", "the baker", "a surveyor", "our neighbour")
_VERBS = ("waited by", "walked past", "wrote about", "returned to", "asked after", "looked over", "slept near")
_OBJECTS = ("the harbour", "a stone bridge", "the empty market", "two tall pines", "the north road", "the mill")
_ENDINGS = ("until noon", "in the rain", "without a word", "before the bell rang", "as every year", "at dusk")


def noise(rng: np.random.Generator) -> Iterator[str]:
    """Generates endless sentences that say little."""
    while True:
        parts = [words[rng.integers(len(words))] for words in (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS)]
        sentence = " ".join(parts)
        yield sentence[0].upper() + sentence[1:] + "."


def haystack(path: pathlib.Path | None, rng: np.random.Generator) -> Iterator[str]:
    """Yields the sentences of a text, beginning with a random one in its first half; without a text, `noise`."""
    if path is None:
        yield from noise(rng)
        return
    text = re.sub(r"\s+", " ", read_text(path)).strip()
    sentences = re.split(r"(?<=[.!?])\s", text)
    yield from sentences[rng.integers(len(sentences) // 2 + 1) :]


_ADJECTIVES = [
    "amber",
    "brisk",
    "calm",
    "dusty",
    "early",
    "faint",
    "green",
    "hollow",
    "idle",
    "jagged",
    "keen",
    "loud",
    "mellow",
    "narrow",
    "oval",
    "plain",
]
_NOUNS = [
    "anchor",
    "barrel",
    "candle",
    "desk",
    "engine",
    "feather",
    "glove",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "lantern",
    "mirror",
    "needle",
]


def names(rng: np.random.Generator, count: int) -> list[str]:
    """Draws distinct names such as "dusty-lantern", with a number at the end once all pairs of words are used."""
    size = len(_ADJECTIVES) * len(_NOUNS)
    chosen = []
    for index in rng.permutation(max(size, count))[:count]:
        adjective, noun = divmod(int(index) % size, len(_NOUNS))
        suffix = "" if index < size else f"-{index // size + 1}"
        chosen.append(f"{_ADJECTIVES[adjective]}-{_NOUNS[noun]}{suffix}")
    return chosen


def distinct(texts: Iterator[str]) -> Iterator[str]:
    """Leaves out the texts that have come before."""
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text


def digits(rng: np.random.Generator, count: int) -> str:
    """Draws a number of `count` digits that does not begin with 0."""
    return str(rng.integers(10 ** (count - 1), 10**count))
