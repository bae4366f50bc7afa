"""Right-padded random prompts for the tests of attention kernels, and what all of them refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from oracle.layout import DTYPES
from support.layers import poison


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Sizes of some prompts, and options of the attention over them."""

    tokens: int
    lengths: tuple[int, ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 128
    dtype: str = "bfloat16"
    scale: float | None = None
    window: int | None = None

    @property
    def logit_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    def arrays(self, seed: int, values: bool = True) -> tuple[np.ndarray, ...]:
        """Makes q, k, perhaps v, and lengths, with NaN in the padding. Some keys are heavy hitters."""
        rng, lengths = np.random.default_rng(seed), np.array(self.lengths, np.int32)
        lead = (len(lengths), self.tokens)
        heads = (self.heads, self.kv_heads, self.kv_heads) if values else (self.heads, self.kv_heads)
        arrays = [rng.normal(size=(*lead, n, self.head_dim)) for n in heads]
        arrays[1][:, :, :, 0] += 3 * rng.normal(size=(*lead, 1))
        poison(lengths, *arrays)
        return *(x.astype(DTYPES[self.dtype]) for x in arrays), lengths


def random_prompts(rng: np.random.Generator, longest: int) -> Prompts:
    """Draws prompts of less than `longest` tokens that the CUDA kernels support."""
    tokens, kv_heads = int(rng.integers(1, longest)), int(rng.integers(1, 4))
    return Prompts(
        tokens,
        tuple(int(n) for n in rng.integers(0, tokens + 1, rng.integers(1, 4))),
        heads=kv_heads * int(rng.integers(1, 5)),
        kv_heads=kv_heads,
        head_dim=int(rng.choice([64, 96, 128])),
        dtype=str(rng.choice(["bfloat16", "float16"])),
        window=None if rng.random() < 0.6 else int(rng.integers(1, tokens + 1)),
    )


# Changes that no CUDA kernel supports, with the error and its text.
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"dtype": "float32"}, NotImplementedError, "float32"),
    ({"head_dim": 80}, NotImplementedError, "head_dim=80"),
    ({"heads": 3}, ValueError, "3 query heads over 2"),
    ({"window": 0}, ValueError, "window=0"),
    ({"scale": -1.0}, ValueError, "scale=-1"),
]
