"""The methods of a run, fitted to a share of the full cache's bytes where one is asked for."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from minikv_jax.cache import memory
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models.config import ModelConfig

_UNIT = 10000  # shares of a prompt are multiples of 1/_UNIT (selection.budget_tokens)


class Method(NamedTuple):
    """A method, and the share of the full cache's bytes that it is fitted to, if any."""

    config: CacheConfig
    byte_share: float | None = None

    def fit(self, model: ModelConfig, *, prompt_length: int, max_new_tokens: int, dtype: str) -> CacheConfig:
        """The config for a padded prompt length: its own, or the largest budget whose bytes stay within the share.

        Bytes are everything that is allocated. What grows is `heavy`, and with it `recent` in proportion where both
        are shares of the prompt; where `heavy` is 0, `recent`. Nothing else changes.

        Raises:
          ValueError: a method without a budget, or one that does not fit however few tokens it keeps.
        """
        if self.byte_share is None:
            return self.config

        def report(config: CacheConfig) -> memory.MemoryReport:
            return memory.report(model, config, prompt_length=prompt_length, max_new_tokens=max_new_tokens, dtype=dtype)

        full = report(presets.get("full")).bytes
        candidates = _Candidates(self.config, prompt_length)
        low, high = 0, len(candidates)  # candidates below `low` fit, those from `high` on do not
        while low < high:
            middle = (low + high) // 2
            if report(candidates[middle]).bytes <= self.byte_share * full:
                low = middle + 1
            else:
                high = middle
        if not low:
            least = report(candidates[0]).bytes / full
            raise ValueError(
                f"method {self.config.name!r} does not fit {self.byte_share:.2%} of the full cache's bytes for "
                f"{prompt_length} + {max_new_tokens} tokens: its smallest budget takes {least:.2%}"
            )
        return candidates[low - 1]


class _Candidates:
    """A method with every budget there is, smallest first."""

    def __init__(self, config: CacheConfig, prompt_length: int):
        if config.keeps_all:
            raise ValueError(f"method {config.name!r} keeps every token: it has no budget to fit to a share of bytes")
        self._config = config
        heavy, recent = config.heavy, config.recent
        self._field = "heavy" if heavy else "recent"
        value = heavy or recent
        self._share = isinstance(value, float)
        self._recent_per_heavy = recent / heavy if heavy and self._share and isinstance(recent, float) else None
        if not self._share:
            self._most = prompt_length
        elif self._recent_per_heavy is None:
            self._most = _UNIT
        else:
            self._most = int(_UNIT / (1 + self._recent_per_heavy))

    def __len__(self) -> int:
        return self._most

    def __getitem__(self, index: int) -> CacheConfig:
        units = index + 1
        changes: dict[str, float | int] = {self._field: units / _UNIT if self._share else units}
        if self._recent_per_heavy is not None:
            changes["recent"] = int(units * self._recent_per_heavy) / _UNIT
        return dataclasses.replace(self._config, **changes)
