"""Fits a method's token budget to a share of the full cache's bytes."""

from __future__ import annotations

import bisect
import dataclasses
from typing import NamedTuple

from minikv_jax.cache import memory
from minikv_jax.methods import lookup
from minikv_jax.methods.method import SHARE_UNITS, Amount, Method, Share, Tokens
from minikv_jax.models.config import ModelConfig


class SizedMethod(NamedTuple):
    """A method and, optionally, the share of the full cache's bytes to fit it to.

    Attributes:
      method: the method.
      byte_share: fraction of the full cache's bytes; None leaves the method unchanged.
    """

    method: Method
    byte_share: float | None = None

    def fit(self, model: ModelConfig, *, prompt_length: int, max_new_tokens: int, dtype: str) -> Method:
        """Returns the method with the largest budget that fits the byte share.

        Bytes are everything that is allocated. `heavy` changes, and `recent` in proportion if both are shares of the
        prompt. If `heavy` is 0, `recent` changes.

        Args:
          model: the model's shape.
          prompt_length: padded prompt length, in tokens.
          max_new_tokens: tokens that the cache has room for after the prompt.
          dtype: the model's dtype.

        Returns:
          The fitted method, or the same one if there is no byte share.

        Raises:
          ValueError: the method has no budget, or its smallest budget exceeds the byte share.
        """
        if self.byte_share is None:
            return self.method
        if self.method.keeps_all:
            raise ValueError(
                f"method {self.method.name!r} keeps every token: it has no budget to fit to a share of bytes"
            )

        def allocated(method: Method) -> int:
            sizes = {"prompt_length": prompt_length, "max_new_tokens": max_new_tokens}
            return memory.report(model, method, **sizes, dtype=dtype).bytes

        full = allocated(lookup.get("full"))
        budgets = _budgets(self.method, prompt_length)
        fitting = bisect.bisect_right(
            budgets, self.byte_share * full, key=lambda budget: allocated(_with_budget(self.method, budget))
        )
        if not fitting:
            smallest = allocated(_with_budget(self.method, budgets[0])) / full
            raise ValueError(
                f"method {self.method.name!r} does not fit {self.byte_share:.2%} of the full cache's bytes for "
                f"{prompt_length} + {max_new_tokens} tokens: its smallest budget takes {smallest:.2%}"
            )
        return _with_budget(self.method, budgets[fitting - 1])


def _budgets(method: Method, prompt_length: int) -> range:
    """All budgets that `_with_budget` accepts, in tokens or in units of a share."""
    if isinstance(method.heavy or method.recent, Tokens):
        return range(1, prompt_length + 1)
    largest = int(SHARE_UNITS / (1 + (_recent_per_heavy(method) or 0)))
    all_stay = not method.heavy and (method.retrieval_heads or method.evict_every is not None)  # which is refused
    return range(1, largest if all_stay else largest + 1)


def _with_budget(method: Method, budget: int) -> Method:
    """Replaces `heavy`, or `recent` if the method has no `heavy`."""
    ratio = _recent_per_heavy(method)
    if ratio is not None:
        return dataclasses.replace(method, heavy=_share(budget), recent=_share(int(budget * ratio)))
    new: Amount = Tokens(budget) if isinstance(method.heavy or method.recent, Tokens) else _share(budget)
    return dataclasses.replace(method, heavy=new) if method.heavy else dataclasses.replace(method, recent=new)


def _share(units: int) -> Share:
    return Share(units / SHARE_UNITS)


def _recent_per_heavy(method: Method) -> float | None:
    """The ratio of `recent` to `heavy` if both are shares of the prompt and therefore change together."""
    if method.heavy and isinstance(method.heavy, Share) and isinstance(method.recent, Share):
        return method.recent.fraction / method.heavy.fraction
    return None
