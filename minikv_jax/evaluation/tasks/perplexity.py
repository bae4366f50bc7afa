"""`perplexity`: windows of a text, each a prompt with its true continuation."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from minikv_jax.checks import at_least
from minikv_jax.evaluation.task import Case, need_file, need_tokenizer, option, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Perplexity over `limit` windows of a text, evenly spaced and not overlapping."""

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "likelihood of a text's continuation, in windows of the text"

    text: pathlib.Path = option("a UTF-8 text, as a book", parse=pathlib.Path)
    context: int = option("prompt tokens", 2048, parse=int)
    continuation: int = option("tokens after the prompt", 120, parse=int)
    limit: int = option("windows", 4, parse=int)

    def __post_init__(self) -> None:
        at_least(1, context=self.context, continuation=self.continuation, limit=self.limit)
        need_file(self.text)

    def cases(self, tokenizer: PreTrainedTokenizerBase | None, positions: int) -> list[Case]:
        size = self.context + self.continuation
        if size > positions:
            raise ValueError(
                f"context={self.context} + continuation={self.continuation} exceed the model's {positions} positions"
            )
        text = read_text(self.text)
        ids = need_tokenizer(tokenizer).encode(text, add_special_tokens=False)
        windows = book_windows(ids, self.context, self.continuation, self.limit)
        return [
            Case(f"window {index}", tuple(prompt), tuple(continuation))
            for index, (prompt, continuation) in enumerate(windows)
        ]

    def score(self, case: Case, text: str) -> None:
        del case, text


def book_windows(ids: Sequence[int], prompt: int, continuation: int, count: int) -> list[tuple[list[int], list[int]]]:
    """Cuts evenly spaced, non-overlapping windows from a text.

    Args:
      ids: token ids of the text.
      prompt: prompt tokens per window.
      continuation: continuation tokens per window.
      count: number of windows.

    Returns:
      Each window's prompt ids and continuation ids.

    Raises:
      ValueError: a size is below 1, or the text is too short for the windows.
    """
    at_least(1, prompt=prompt, continuation=continuation, count=count)
    size = prompt + continuation
    if len(ids) < size * count:
        raise ValueError(f"the text has {len(ids)} tokens: {count} windows of {size} need {size * count}")
    starts = [index * (len(ids) // count) for index in range(count)]
    return [(list(ids[s : s + prompt]), list(ids[s + prompt : s + size])) for s in starts]
