"""`kv-retrieval`: a value in a JSON object of random keys, after Lost in the Middle (Liu et al., arXiv 2307.03172)."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Iterator
from typing import ClassVar

import numpy as np

from minikv_jax.evaluation.tasks.retrieval import Episode, Retrieval


@dataclasses.dataclass(frozen=True)
class KVRetrieval(Retrieval):
    """Retrieves a value by its key. Any line may be asked for, so none can be dropped safely."""

    name: ClassVar[str] = "kv-retrieval"
    summary: ClassVar[str] = "the value of one key among many random ones"

    def episode(self, rng: np.random.Generator, depth: float) -> Episode:
        def pairs() -> Iterator[str]:
            while True:
                yield f'"{_uuid(rng)}": "{_uuid(rng)}",'

        key, value = _uuid(rng), _uuid(rng)
        return Episode(
            "Look up one value in this JSON object.\n{",
            pairs(),
            [(depth, f'"{key}": "{value}",')],
            f'}}\nWhich value belongs to the key "{key}"?',
            f'The value of "{key}" is "',
            f'{value}"',
            (value,),
            "\n",
        )


def _uuid(rng: np.random.Generator) -> str:
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))
