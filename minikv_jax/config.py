"""What a run needs to know: the model's shape (`ModelConfig`) and the compression method (`CacheConfig`)."""

from __future__ import annotations

import dataclasses

BITS = (1, 2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128)
METADATA_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")
SCORERS = ("none", "cumulative", "window")
BUDGETS = ("uniform", "pyramid", "variance")
RESIDUAL_RULES = ("minikv", "kivi")
POOLINGS = ("max", "mean")

# Bits of a code are stored in planes of these widths (docs/architecture.md, "Packed layout").
PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """One KV-cache compression method: which tokens are kept, and how the kept ones are stored.

    Budgets are shares of the prompt (a float in 0..1, resolved to 1/10000) or token counts (an int). They are chosen
    once, at prefill, per layer and KV head; every generated token is kept.
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
    variance_cap: float = 2.0  # under "variance" no layer gets more than this multiple of `heavy`
    observation_window: int = 32  # "window" scorer: the last queries that vote (SnapKV)
    pooling: str = "max"  # "window" scorer: pooling of the votes along tokens
    pooling_kernel: int = 7

    # Storage. None keeps the model's dtype.
    k_bits: int | None = None
    v_bits: int | None = None
    group_size: int = 16
    metadata_dtype: str = "float16"
    residual: str = "minikv"  # "minikv": the tail is packed whole when full; "kivi": the newest stay in full precision
    residual_length: int = 128

    def __post_init__(self) -> None:
        _require_choice("scorer", self.scorer, SCORERS)
        _require_choice("budget", self.budget, BUDGETS)
        _require_choice("pooling", self.pooling, POOLINGS)
        _require_choice("metadata_dtype", self.metadata_dtype, METADATA_DTYPES)
        _require_choice("residual", self.residual, RESIDUAL_RULES)
        _require_choice("group_size", self.group_size, GROUP_SIZES)
        for name in ("k_bits", "v_bits"):
            _require_choice(name, getattr(self, name), (None, *BITS))
        if (self.k_bits is None) != (self.v_bits is None):
            raise ValueError(f"k_bits={self.k_bits}, v_bits={self.v_bits}: quantise both K and V or neither")
        for name in ("heavy", "recent"):
            _require_budget(name, getattr(self, name))
        if isinstance(self.heavy, float) and isinstance(self.recent, float) and self.heavy + self.recent > 1:
            raise ValueError(f"heavy={self.heavy} + recent={self.recent} is over 1: shares of the prompt may not sum over 1")
        if self.heavy > 0 and self.scorer == "none":
            raise ValueError(f"heavy={self.heavy} needs a scorer: one of {', '.join(SCORERS[1:])}, not 'none'")
        for name, least in (("sinks", 0), ("observation_window", 1), ("pooling_kernel", 1), ("residual_length", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer >= {least}")
        if self.pooling_kernel % 2 == 0:
            raise ValueError(f"pooling_kernel={self.pooling_kernel}: expected an odd number")
        for name in ("pyramid_beta", "variance_cap"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a number >= 1")
        if self.quantized and self.residual_length % self.packing_block:
            raise ValueError(
                f"residual_length={self.residual_length}: expected a multiple of the packing block {self.packing_block}"
            )

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
        """Tokens that enter the packed region together: the smallest count that fills whole groups and whole words."""
        assert self.k_bits is not None and self.v_bits is not None
        return max(self.group_size, 32 // min(PLANES[self.k_bits] + PLANES[self.v_bits]))

    @property
    def flush_block(self) -> int:
        """Tokens that leave a full tail at once."""
        return self.residual_length if self.residual == "minikv" else self.packing_block

    @property
    def tail_keep(self) -> int:
        """Newest tokens that stay in full precision after a flush."""
        return 0 if self.residual == "minikv" else self.residual_length


def _require_choice(name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, choices))}")


def _require_budget(name: str, value: float | int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r}: expected a share (float in 0..1) or a token count (int >= 0)")
    if value < 0 or (isinstance(value, float) and not value <= 1):
        raise ValueError(f"{name}={value!r}: expected a share (float in 0..1) or a token count (int >= 0)")
