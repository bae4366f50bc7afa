"""Measures every kind of model against transformers, and writes the table of docs/models.md.

Run from the repository's root: `PYTHONPATH=tests python -m support.kinds_table`. `--missing` measures only the kinds
that the table lacks.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import sys
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import torch
from support.family_cases import KINDS, Kind, write_kind

from minikv_jax.generate import generate
from minikv_jax.models.huggingface import load_safetensors
from minikv_jax.one_shot import one_shot

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
MARKS = "<!-- table of kinds -->\n", "<!-- end of the table -->\n"
PROMPT, NEW = 24, 48  # tokens of the prompt, longer than any window, and after it


@dataclasses.dataclass(frozen=True)
class Measured:
    """A kind against transformers, both in float32 on a CPU.

    Attributes:
      largest: largest absolute logit of transformers over the prompt.
      difference: largest absolute difference of a logit.
      equal: greedy tokens that are equal up to the first that differs, of `NEW`.
    """

    largest: float
    difference: float
    equal: int


def measure(kind: Kind) -> Measured:
    """Compares a kind's logits of a prompt, and the greedy tokens after it with a full cache."""
    with tempfile.TemporaryDirectory() as directory:
        theirs = write_kind(kind, pathlib.Path(directory))
        ours = load_safetensors(directory)
    prompt = np.random.default_rng(1).integers(0, 96, (1, PROMPT))
    with torch.no_grad():
        logits = theirs(torch.from_numpy(prompt)).logits.numpy()
        options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0, "eos_token_id": None}
        expected = theirs.generate(torch.from_numpy(prompt), do_sample=False, **options)[0, PROMPT:].numpy()
    found = np.asarray(jax.jit(one_shot)(ours, jnp.asarray(prompt, jnp.int32)))
    tokens = generate(ours, prompt.tolist(), method="full", max_new_tokens=NEW, eos_token_ids=()).tokens[0]
    same = np.asarray(tokens) == expected
    equal = NEW if same.all() else int(np.argmin(same))
    return Measured(float(np.max(np.abs(logits))), float(np.max(np.abs(found - logits))), equal)


def rows(known: dict[str, str]) -> list[str]:
    """Measures all kinds that are not `known`, and returns the table's rows."""
    table = []
    for name, kind in KINDS.items():
        if name in known:
            table.append(known[name])
            continue
        measured = measure(kind)
        equal = "all" if measured.equal == NEW else f"the first {measured.equal}"
        table.append(
            f"| {name} | `{kind.model_type}` | {measured.difference:.0e} | {measured.largest:.1f} | {equal} |\n"
        )
        print(table[-1], end="", flush=True)
    return table


def documented() -> list[list[str]]:
    """Reads the cells of the table's rows in the page."""
    text = PAGE.read_text(encoding="utf-8")
    inside = text[text.index(MARKS[0]) : text.index(MARKS[1])]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"^\| .*` \| \d.*$", inside, re.M)]


def main() -> None:
    """Replaces the table in the page."""
    warnings.simplefilter("ignore")  # transformers' own
    text = PAGE.read_text(encoding="utf-8")
    known = {row[0]: f"| {' | '.join(row)} |\n" for row in documented()} if "--missing" in sys.argv else {}
    head = "| kind | `model_type` | largest difference of a logit | largest logit | greedy tokens equal, of 48 |\n"
    table = head + "|---|---|---|---|---|\n" + "".join(rows(known))
    before, after = text[: text.index(MARKS[0])], text[text.index(MARKS[1]) :]
    PAGE.write_text(before + MARKS[0] + table + after, encoding="utf-8")


if __name__ == "__main__":
    main()
