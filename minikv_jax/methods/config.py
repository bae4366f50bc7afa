"""The compression method: which tokens are kept, and how the kept ones are stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from minikv_jax import checks
from minikv_jax.methods.base import BUDGETS, MAX_BLOCK, QUANTIZERS, SCORERS, Option

BITS = (1, 2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
RESIDUAL_RULES = ("minikv", "kivi")
POOLINGS = ("max", "mean")

# Bits of a code are stored in planes of these widths (docs/architecture.md, "Packed layout").
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CacheConfig:
    """One KV-cache compression method: which tokens are kept, and how the kept ones are stored.

    Budgets are shares of the prompt (a float in 0..1, resolved to 1/10000) or token counts (an int). They are chosen
    once, at prefill, per layer and KV head; every generated token is kept, unless `evict_every` says otherwise.

    `scorer`, `budget` and `quantizer` are names (`minikv_jax.methods.base`), of the library's schemes or of a user's.
    `options` are settings of these schemes' own, given as a mapping, kept as sorted pairs: `option` reads one.

    Two are equal where all fields have the same types and values: a count of 1 is not a share of 1.0.
    """

    name: str = "custom"
    citation: str = ""

    # Selection. "none" scores nothing: only the sinks and the recent window stay (all tokens if recent is 1.0).
    scorer: str = "none"
    heavy: float | int = 0.0  # budget of top-scored tokens ("heavy hitters", H2O)
    recent: float | int = 1.0  # budget of newest tokens
    sinks: int = 0  # leading tokens always kept, in full precision, beside the budgets (StreamingLLM)
    budget: str = "uniform"  # how `heavy` is spread over layers
    pyramid_beta: float = 7.0  # last layer's heavy share = mean / beta (MiniKV 7, PyramidKV 20)
    variance_cap: float = 2.0  # under a rule that reads scores ("variance") no layer gets over this multiple of `heavy`
    observation_window: int = 32  # "window" scorer: the last queries that vote (SnapKV)
    pooling: str = "max"  # "window" scorer: pooling of the votes along tokens
    pooling_kernel: int = 7
    evict_every: int | None = (
        None  # new tokens after which a layer is cut back to its budget; None: never (eviction.py)
    )

    # Storage. Bits of None keep the model's dtype, and then nothing is quantised.
    quantizer: str = "minmax"
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int = 16
    metadata_dtype: str = "float16"
    residual: str = "minikv"  # "minikv": the tail is packed whole when full; "kivi": the newest stay in full precision
    residual_length: int = 128

    options: Mapping[str, Option] | tuple[tuple[str, Option], ...] = ()

    def __post_init__(self) -> None:
        SCORERS.require(self.scorer)
        BUDGETS.require(self.budget)
        QUANTIZERS.require(self.quantizer)
        checks.choice("pooling", self.pooling, POOLINGS)
        checks.choice("metadata_dtype", self.metadata_dtype, METADATA_DTYPES)
        checks.choice("residual", self.residual, RESIDUAL_RULES)
        checks.choice("group_size", self.group_size, GROUP_SIZES)
        bits = QUANTIZERS[self.quantizer].bits
        for name in ("k_bits", "v_bits"):
            checks.choice(f"quantizer={self.quantizer!r}: {name}", getattr(self, name), (None, *bits))
        if self.k_bits is None and self.quantizer != "minmax":
            raise ValueError(f"quantizer={self.quantizer!r} needs k_bits and v_bits, of {', '.join(map(str, bits))}")
        if (self.k_bits is None) != (self.v_bits is None):
            raise ValueError(f"k_bits={self.k_bits}, v_bits={self.v_bits}: quantise both K and V or neither")
        for name in ("heavy", "recent"):
            object.__setattr__(self, name, _budget(name, getattr(self, name)))
        if isinstance(self.heavy, float) and isinstance(self.recent, float) and self.heavy + self.recent > 1:
            raise ValueError(
                f"heavy={self.heavy} + recent={self.recent} is over 1: shares of the prompt may not sum over 1"
            )
        if self.heavy > 0 and self.scorer == "none":
            raise ValueError(f"heavy={self.heavy} needs a scorer: one of {', '.join(SCORERS)}, not 'none'")
        for name, least in (("sinks", 0), ("observation_window", 1), ("pooling_kernel", 1), ("residual_length", 1)):
            object.__setattr__(self, name, checks.integer(name, getattr(self, name), least))
        if self.pooling_kernel % 2 == 0:
            raise ValueError(f"pooling_kernel={self.pooling_kernel}: expected an odd number")
        if self.evict_every is not None:
            object.__setattr__(self, "evict_every", checks.integer("evict_every", self.evict_every, 1))
            _check_eviction(self)
        for name in ("pyramid_beta", "variance_cap"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number >= 1")
        object.__setattr__(self, "options", _sorted_options(self))
        if self.quantized and MAX_BLOCK % self.packing_block:
            raise ValueError(
                f"quantizer={self.quantizer!r} has block={self.packing_block}: expected a divisor of {MAX_BLOCK}"
            )
        if self.quantized and self.residual_length % self.packing_block:
            raise ValueError(
                f"residual_length={self.residual_length}: expected a multiple of the packing block {self.packing_block}"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CacheConfig) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[tuple[type, Any], ...]:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return tuple((type(value), value) for value in values)

    @property
    def quantized(self) -> bool:
        """Whether K and V are stored as codes."""
        return self.k_bits is not None

    @property
    def keeps_all(self) -> bool:
        """Whether no token is ever evicted."""
        return isinstance(self.recent, float) and self.recent == 1.0

    @property
    def packing_block(self) -> int:
        """Tokens that enter the packed region together; the method must quantise."""
        return QUANTIZERS[self.quantizer].block(self)

    @property
    def option_defaults(self) -> dict[str, Option]:
        """The settings of its schemes' own, with their defaults."""
        schemes = (SCORERS[self.scorer], BUDGETS[self.budget], QUANTIZERS[self.quantizer])
        return {name: value for scheme in schemes for name, value in scheme.options.items()}

    def option(self, name: str) -> Any:
        """The value of a scheme's own setting: what `options` says, or its default."""
        return dict(self.options).get(name, self.option_defaults[name])

    @property
    def flush_block(self) -> int:
        """Tokens that leave a full tail at once."""
        return self.residual_length if self.residual == "minikv" else self.packing_block

    @property
    def tail_keep(self) -> int:
        """Newest tokens that stay in full precision after a flush."""
        return 0 if self.residual == "minikv" else self.residual_length


def _check_eviction(config: CacheConfig) -> None:
    """Raises ValueError where tokens cannot leave the cache during generation."""
    every = f"evict_every={config.evict_every}"
    if config.quantized:
        raise ValueError(
            f"{every} with k_bits={config.k_bits}: only full-precision tokens can leave, those of a packed block share "
            "their metadata"
        )
    if config.keeps_all:
        raise ValueError(f"{every} with recent=1.0: there is no budget to cut back to")
    if config.heavy > 0 and SCORERS[config.scorer].update is None:
        able = ", ".join(name for name in SCORERS if SCORERS[name].update is not None)
        raise ValueError(
            f"{every} with scorer={config.scorer!r}: expected a scorer that goes on during generation ({able})"
        )


def _sorted_options(config: CacheConfig) -> tuple[tuple[str, Option], ...]:
    """`config.options`, a mapping or pairs, as sorted pairs. Raises ValueError naming what is unknown or mistyped."""
    defaults, given = config.option_defaults, dict(config.options)
    for name, value in given.items():
        if name not in defaults:
            known = ", ".join(sorted(defaults)) or "none"
            raise ValueError(
                f"option {name}={value!r}: scorer={config.scorer!r}, budget={config.budget!r} and "
                f"quantizer={config.quantizer!r} have {known}"
            )
        kind = type(defaults[name])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise ValueError(f"option {name}={value!r}: expected {kind.__name__}, as its default {defaults[name]!r}")
        given[name] = kind(value)  # equal options are of equal types
    return tuple(sorted(given.items()))


def _budget(name: str, value: float | int) -> float | int:
    """A share or a count as Python's own type: numpy's compare as another method."""
    share, count = isinstance(value, float | np.floating), isinstance(value, int | np.integer)
    if isinstance(value, bool) or not (share or count) or value < 0 or (share and not value <= 1):
        raise ValueError(f"{name}={value!r}: expected a share (float in 0..1) or a token count (int >= 0)")
    return float(value) if share else int(value)
