"""Scores an answer against one reference, from 0 to 1, as the long-context benchmarks define it.

ROUGE-L and code similarity need the optional packages `rouge` and `rapidfuzz` (`pip install minikv_jax[evaluation]`),
which are imported on first use.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import Any


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the common words, ignoring case, punctuation and articles (SQuAD, arXiv 1606.05250, section 6.1)."""
    predicted, expected = _words(prediction), _words(reference)
    shared = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * shared / (len(predicted) + len(expected)) if shared else 0.0


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L: F-measure of the longest common subsequence of words; 0 if either text has no words."""
    from rouge import Rouge  # optional

    if not prediction.strip(" .\n\t") or not reference.strip(" .\n\t"):
        return 0.0  # the package rejects texts without words
    scores: Any = Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)
    return float(scores[0]["rouge-l"]["f"])


def code_similarity(prediction: str, reference: str) -> float:
    """Edit similarity of the reference and the first line without backticks or comments."""
    from rapidfuzz import fuzz  # optional

    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(code, reference)) / 100


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """Classification score: 1 / number of classes that the answer names, if the right one is among them, or else 0.

    Classes whose names are parts of the right one's name do not count.
    """
    named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def share_of_numbers(prediction: str, number: str) -> float:
    """Fraction of the numbers in the answer that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def paragraph(prediction: str, reference: str) -> float:
    """Applies `share_of_numbers` to a reference such as "Paragraph 12"."""
    (number,) = re.findall(r"Paragraph (\d+)", reference)[:1] or [""]
    return share_of_numbers(prediction, number)


def first_number(prediction: str, number: str) -> float:
    """Returns 1 if the first number of the answer is the right one, or else 0."""
    first = re.search(r"\d+", prediction)
    return float(first is not None and first.group() == number)


def has_word(prediction: str, word: str) -> float:
    """Returns 1 if the answer contains the word, ignoring punctuation, or else 0."""
    return float(word in re.sub(r"[\n:\"'.,?!{}]", " ", prediction).split())


def choice(prediction: str, letter: str) -> float:
    """Returns 1 if the first isolated letter A to D in the answer is the right one, or else 0."""
    first = re.search(r"\b[ABCD]\b", prediction)
    return float(first is not None and first.group() == letter)
