"""Scores of an answer against one reference, 0..1, as the long-context benchmarks define them.

ROUGE-L and the similarity of code need the packages `rouge` and `rapidfuzz` (`pip install minikv_jax[evaluation]`).
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Sequence
from typing import Any


def qa_f1(prediction: str, reference: str) -> float:
    """F1 of the words that both have, without case, punctuation and articles (SQuAD, arXiv 1606.05250, section 6.1)."""
    found, wanted = _words(prediction), _words(reference)
    same = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else 0.0


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def rouge_l(prediction: str, reference: str) -> float:
    """F-measure of the longest common subsequence of words; 0 where either has no words."""
    from rouge import Rouge

    if not prediction.strip(" .\n\t") or not reference.strip(" .\n\t"):
        return 0.0  # the package refuses texts without words
    scores: Any = Rouge(metrics=["rouge-l"]).get_scores(prediction, reference)
    return float(scores[0]["rouge-l"]["f"])


def code_similarity(prediction: str, reference: str) -> float:
    """Edit similarity of the reference and the first line of code: without backticks and comments."""
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(code, reference)) / 100


def classification(prediction: str, reference: str, classes: Sequence[str]) -> float:
    """1 / the number of classes that the answer names, if the right one is among them.

    Classes whose names are parts of the right one's do not count.
    """
    named = [name for name in classes if name in prediction and (name == reference or name not in reference)]
    return 1 / len(named) if reference in named else 0.0


def share_of_numbers(prediction: str, number: str) -> float:
    """The share of the numbers in the answer that are the right one."""
    found = re.findall(r"\d+", prediction)
    return found.count(number) / len(found) if found else 0.0


def paragraph(prediction: str, reference: str) -> float:
    """`share_of_numbers` for a reference such as "Paragraph 12"."""
    (number,) = re.findall(r"Paragraph (\d+)", reference)[:1] or [""]
    return share_of_numbers(prediction, number)


def first_number(prediction: str, number: str) -> float:
    """1 where the first number of the answer is the right one."""
    found = re.search(r"\d+", prediction)
    return float(found is not None and found.group() == number)


def has_word(prediction: str, word: str) -> float:
    """1 where the answer has the word, punctuation aside."""
    return float(word in re.sub(r"[\n:\"'.,?!{}]", " ", prediction).split())


def choice(prediction: str, letter: str) -> float:
    """1 where the first of the letters A to D that stands alone in the answer is the right one."""
    found = re.search(r"\b[ABCD]\b", prediction)
    return float(found is not None and found.group() == letter)
