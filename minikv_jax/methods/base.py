"""`Method`, and what it is composed of: a scorer, two budgets, a budget rule, a quantizer and a tail.

All are frozen values: equal methods compile once, and `dataclasses.replace` changes any part of one. A component is a
class whose fields are its settings; subclass `Scorer`, `Budget`, `ScoredBudget` or `Quantizer` and put an instance into
a `Method`. Names (`registry.py`) exist for the command line only.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, dataclass_transform

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minikv_jax import checks
from minikv_jax.models.config import ModelConfig
from minikv_jax.packing import MAX_BLOCK, Packing

Kind = Literal["keys", "values"]
Length = TypeVar("Length", int, Array)
T = TypeVar("T")

SHARE_UNITS = 10000  # a share is a whole number of 1 / SHARE_UNITS


@dataclasses.dataclass(frozen=True)
class Share:
    """A budget of a fraction of the prompt's tokens, in 0..1, resolved to 1/10000.

    Whole units keep a static capacity and a traced count from ever disagreeing.
    """

    fraction: float

    def __post_init__(self) -> None:
        value = self.fraction
        if isinstance(value, bool) or not isinstance(value, float | np.floating) or not 0 <= value <= 1:
            raise ValueError(f"Share({value!r}): expected a float in 0..1")
        object.__setattr__(self, "fraction", float(value))

    @property
    def units(self) -> int:
        """The fraction in units of 1/10000."""
        return round(self.fraction * SHARE_UNITS)

    def tokens(self, length: Length) -> Length:
        """Tokens granted to a row of `length`: `floor(length * fraction)`."""
        units = self.units
        return length // SHARE_UNITS * units + length % SHARE_UNITS * units // SHARE_UNITS  # exact within 32 bits

    def granted(self, length: Length) -> Length:
        """`tokens`: a fraction of a row never exceeds it."""
        return self.tokens(length)  # pyright: ignore[reportReturnType]  (Length is Length)

    def __bool__(self) -> bool:
        return self.fraction > 0

    def __str__(self) -> str:
        return str(self.fraction)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A budget of a number of tokens."""

    count: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", checks.integer("Tokens", self.count, 0))

    def tokens(self, length: Length) -> Length:
        """Tokens granted to a row of `length`: the count itself if the row has as many."""
        return min(self.count, length) if isinstance(length, int) else jnp.minimum(self.count, length)

    def granted(self, length: Length) -> Length:
        """The count, which may exceed the row: a row that goes on evicting grows up to it."""
        return self.count if isinstance(length, int) else jnp.full_like(length, self.count)  # pyright: ignore[reportReturnType]

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        return str(self.count)


Amount = Share | Tokens


def to_amount(value: Amount | float | int) -> Amount:
    """A budget as given: a float is a share, an int a count. Raises ValueError for anything else."""
    if isinstance(value, Share | Tokens):
        return value
    try:
        is_count = isinstance(value, int | np.integer) and not isinstance(value, bool)
        return Tokens(int(value)) if is_count else Share(value)
    except ValueError as error:
        raise ValueError("expected a share (float in 0..1) or a token count (int >= 0)") from error


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Component:
    """Part of a method: a subclass becomes a frozen dataclass, whose fields are its settings.

    Every setting has a default, an int, float, str or bool; a value of another type is refused when an instance is made
    (an int is taken for a float).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)

    def __post_init__(self) -> None:
        for name, default in settings(type(self)).items():
            object.__setattr__(self, name, _of_the_same_type(name, getattr(self, name), default))


def settings(component: type[Component] | Component) -> dict[str, Any]:
    """The settings of a class with their defaults, or those of an instance with their values."""
    if isinstance(component, type):
        return {field.name: field.default for field in dataclasses.fields(component)}  # pyright: ignore[reportArgumentType]
    return {field.name: getattr(component, field.name) for field in dataclasses.fields(component)}  # pyright: ignore[reportArgumentType]


def _of_the_same_type(name: str, value: Any, default: Any) -> Any:
    """`value` as Python's own type: equal settings are of equal types, and numpy's are not Python's."""
    if isinstance(value, np.generic):
        value = value.item()
    if default is dataclasses.MISSING or callable(default) or type(value) is type(default):
        return value
    if type(default) is float and type(value) is int:
        return float(value)
    raise ValueError(f"{name}={value!r}: expected {type(default).__name__}, as its default {default!r}")


class LayerInputs(NamedTuple):
    """One layer's prompt, as attention and scorers see it. RoPE is already applied; rows are right-padded to `T`.

    Attributes:
      q, k, v: in the model's dtype; what lies beyond a row's length may be anything, NaN too.
      lengths: valid tokens per row.
      column_sums: float32, of the causal softmax map over all queries and the heads of a KV head, if the scorer needs
        them, else None.
      window: the layer's sliding window.
      layer: the layer's number; a scorer gets it as a traced int32 scalar, because layers of equal shapes may share a
        program.
      frequencies: float32 `[H/2]`, radians per position by which RoPE turned channels (i, i + H/2); None if unknown.
      sinks: leading tokens that the method keeps whatever they score.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    lengths: Int[Array, "B"]
    column_sums: Float[Array, "B K T"] | None = None
    window: int | None = None
    layer: Int[Array, ""] | int = 0
    frequencies: Float[Array, "F"] | None = None
    sinks: int = 0


class Scorer(Component, abc.ABC):
    """Scores every prompt token, per layer, row and KV head; higher is kept first.

    Attributes:
      needs_column_sums: whether `score` reads `LayerInputs.column_sums`, a second pass over the prefill's attention.
    """

    needs_column_sums: ClassVar[bool] = False

    @abc.abstractmethod
    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        """A floating-point score per token; padding may score anything.

        Sinks and recent tokens stay whatever they score. NaN counts as the lowest score, and evaluations report it.
        """

    def update(self, scores: Float[Array, "B K C"], weights: Float[Array, "B K C"]) -> Float[Array, "B K C"]:
        """The scores after a decode step, which `Method.evict_every` needs.

        Args:
          scores: of the cache's `C` slots; 0 for a new token.
          weights: attention that the slots got in this step, summed over the query heads of a KV head.
        """
        raise NotImplementedError

    @property
    def can_update(self) -> bool:
        """Whether the scores go on during generation."""
        return type(self).update is not Scorer.update


class NoScores(Scorer):
    """Scores all tokens alike: position alone decides (StreamingLLM, or no eviction at all)."""

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        batch, tokens, kv_heads, _ = inputs.k.shape
        return jnp.zeros((batch, kv_heads, tokens), jnp.float32)


class FunctionScorer(Scorer):
    """A function `score(inputs)` as a scorer."""

    function: Callable[[LayerInputs], Array]

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        return self.function(inputs)


class Budget(Component, abc.ABC):
    """Spreads the heavy budget over layers."""

    @abc.abstractmethod
    def weights(self, num_layers: int) -> Sequence[float]:
        """One non-negative number per layer, of which only the ratios count."""


class Uniform(Budget):
    """The same budget for every layer."""

    def weights(self, num_layers: int) -> list[float]:
        return [1.0] * num_layers


class FunctionBudget(Budget):
    """A function `weights(num_layers)` as a budget rule."""

    function: Callable[[int], Sequence[float]]

    def weights(self, num_layers: int) -> Sequence[float]:
        return self.function(num_layers)


class ScoredBudget(Component, abc.ABC):
    """Spreads the heavy budget over layers by their scores, inside the compiled prefill and after all layers.

    Attributes:
      cap: no layer gets more than this multiple of the mean budget; it decides how much is allocated.
    """

    cap: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.cap >= 1:
            raise ValueError(f"cap={self.cap!r}: expected a number >= 1")

    @abc.abstractmethod
    def weights(self, scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"]) -> Float[Array, "L B"]:
        """Non-negative weights per layer and row, of which only the ratios count."""


class Operand(NamedTuple):
    """The keys or the values of one layer.

    Attributes:
      layer: the layer's number for a quantizer that says `by_layer`, else None.
    """

    kind: Kind
    layer: int | None = None


class Quantizer(Component, abc.ABC):
    """Stores keys and values in few bits. Subclasses give at least `encode` and `decode`.

    Attributes:
      choices: what `k_bits` and `v_bits` may be.
      by_layer: whether it reads `Operand.layer`. If not, layers of equal shapes share a program.
      kernel_packs: whether `encode` is `minikv_jax.packing.encode_minmax` by `packing(kind)`, which a kernel may do
        instead. False in a subclass that defines `encode`, unless it says otherwise.
      kernel_reads: likewise for `decode` and `minikv_jax.packing.dequantize`.
    """

    choices: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 8)
    by_layer: ClassVar[bool] = False
    kernel_packs: ClassVar[bool] = False
    kernel_reads: ClassVar[bool] = False

    k_bits: int = 2
    v_bits: int = 2

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for function, flag in (("encode", "kernel_packs"), ("decode", "kernel_reads")):
            if function in vars(cls) and flag not in vars(cls):
                setattr(cls, flag, False)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("k_bits", self.k_bits, self.choices)
        checks.choice("v_bits", self.v_bits, self.choices)

    @property
    def block(self) -> int:
        """Tokens that enter the packed region together: a divisor of `MAX_BLOCK` and of what a tail packs."""
        return 32

    def operand(self, kind: Kind, layer: int) -> Operand:
        """The keys or the values of layer number `layer`."""
        return Operand(kind, layer if self.by_layer else None)

    def bits(self, kind: Kind) -> int:
        """`k_bits` or `v_bits`."""
        return self.k_bits if kind == "keys" else self.v_bits

    def packing(self, kind: Kind) -> Packing:
        """How keys or values are packed, for a quantizer that kernels pack or read."""
        raise NotImplementedError(f"{type(self).__name__} has a layout of its own")

    @abc.abstractmethod
    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> Any:
        """What to store of `S` tokens, a multiple of `block`.

        Returns:
          A `QuantizedArray`, or any pytree of arrays `[B, K, S / r, ...]` in which `r` divides the block, each array
          with its own `r`. Blocks are quantised independently of one another.
        """

    @abc.abstractmethod
    def decode(self, stored: Any, operand: Operand) -> Float[Array, "B K S H"]:
        """The tokens that `stored`, any whole number of blocks, stands for."""

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"] | None:
        """An orthogonal `R`: the cache then holds `k @ R` (or `v @ R`), its tail too.

        Queries are rotated as the keys are, and the output is rotated back, so that attention is unchanged.
        """
        del operand, head_dim
        return None

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError if the quantizer cannot serve this model; shapes are checked without it."""
        del model


class Tail(Component):
    """The newest tokens of a cache that quantises, in full precision.

    Attributes:
      length: tokens. The tail has room for as many, beside the sinks, and `rule` says which of them stay.
      rule: "minikv" packs the whole tail when it is full, and after the prompt leaves only what fills no packing block;
        "kivi" packs block by block, so that the newest `length` tokens always stay.
    """

    length: int = 128
    rule: str = "minikv"

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("tail.length", self.length, 1)
        checks.choice("tail.rule", self.rule, ("minikv", "kivi"))


def to_scorer(value: Scorer | Callable[[LayerInputs], Array]) -> Scorer:
    """A scorer as given, or a function `score(inputs)` made one."""
    if isinstance(value, Scorer):
        return value
    if isinstance(value, type) or not callable(value):
        raise ValueError("expected an instance of a Scorer class, or a function of LayerInputs")
    return FunctionScorer(function=value)


def to_budget(value: Budget | ScoredBudget | Callable[[int], Sequence[float]]) -> Budget | ScoredBudget:
    """A budget rule as given, or a function `weights(num_layers)` made one."""
    if isinstance(value, Budget | ScoredBudget):
        return value
    if isinstance(value, type) or not callable(value):
        raise ValueError("expected an instance of a Budget or ScoredBudget class, or a function of num_layers")
    return FunctionBudget(function=value)


def _field(*, default: Any, converter: Callable[[Any], Any]) -> Any:
    """A field whose value `converter` makes of what is given (type checkers know the name `converter`)."""
    return dataclasses.field(default=default, metadata={"converter": converter})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, _field))
def _value(cls: type[T]) -> type[T]:
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@_value
class Method:
    """A KV-cache compression method: which tokens are kept, and how the kept ones are stored.

    Tokens are chosen once, at prefill, per layer and KV head. Every generated token is kept, unless `evict_every` is
    given. Name and citation are not part of a method's identity.

    Attributes:
      scorer: scores the prompt's tokens; a function `score(inputs)` will do.
      heavy: budget of top-scored tokens ("heavy hitters", H2O); a float is a share of the prompt, an int a count.
      recent: budget of newest tokens, likewise.
      sinks: leading tokens always kept, in full precision, beside the budgets (StreamingLLM).
      budget: spreads `heavy` over layers; a function `weights(num_layers)` will do.
      evict_every: new tokens after which a layer is cut back to its budget; None: never (`ops/evict.py`).
      quantizer: stores K and V; None keeps them in the model's dtype.
      tail: the newest tokens that are not quantised.
    """

    name: str = dataclasses.field(default="custom", compare=False)
    citation: str = dataclasses.field(default="", compare=False)

    scorer: Scorer = _field(default=NoScores(), converter=to_scorer)
    heavy: Amount = _field(default=Share(0.0), converter=to_amount)
    recent: Amount = _field(default=Share(1.0), converter=to_amount)
    sinks: int = 0
    budget: Budget | ScoredBudget = _field(default=Uniform(), converter=to_budget)
    evict_every: int | None = None

    quantizer: Quantizer | None = None
    tail: Tail = Tail()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, field.metadata.get("converter", lambda same: same)(value))
            except ValueError as error:
                raise ValueError(f"{field.name}={value!r}: {error}") from error
        object.__setattr__(self, "sinks", checks.integer("sinks", self.sinks, 0))
        shares = [budget.units for budget in (self.heavy, self.recent) if isinstance(budget, Share)]
        if sum(shares) > SHARE_UNITS:
            raise ValueError(f"heavy={self.heavy} + recent={self.recent}: shares of the prompt may not sum over 1")
        if self.heavy and isinstance(self.scorer, NoScores):
            raise ValueError(f"heavy={self.heavy} needs a scorer, such as H2O(): NoScores() ranks no token")
        if self.quantizer is not None:
            self._check_storage(self.quantizer)
        if not isinstance(self.tail, Tail):
            raise ValueError(f"tail={self.tail!r}: expected a Tail")
        if self.evict_every is not None:
            object.__setattr__(self, "evict_every", checks.integer("evict_every", self.evict_every, 1))
            self._check_eviction()

    def _check_storage(self, quantizer: Quantizer) -> None:
        if not isinstance(quantizer, Quantizer):
            raise ValueError(f"quantizer={quantizer!r}: expected a Quantizer or None")
        kind = type(quantizer).__name__
        if MAX_BLOCK % quantizer.block:
            raise ValueError(f"{kind} has block={quantizer.block}: expected a divisor of {MAX_BLOCK}")
        if self.tail.length % quantizer.block:
            raise ValueError(
                f"tail.length={self.tail.length}: expected a multiple of {kind}'s packing block {quantizer.block}"
            )

    def _check_eviction(self) -> None:
        every = f"evict_every={self.evict_every}"
        if self.quantizer is not None:
            raise ValueError(
                f"{every} with {type(self.quantizer).__name__}: only full-precision tokens can leave, those of a "
                "packed block share their metadata"
            )
        if self.keeps_all:
            raise ValueError(f"{every} with recent=1.0: there is no budget to cut back to")
        if self.heavy and not self.scorer.can_update:
            raise ValueError(
                f"{every} with {type(self.scorer).__name__}: expected a scorer that goes on during generation (one "
                "with `update`, such as H2O or TOVA)"
            )

    @property
    def keeps_all(self) -> bool:
        """Whether no token is ever evicted."""
        return self.recent == Share(1.0)

    @property
    def flush_block(self) -> int:
        """Tokens that leave a full tail at once."""
        if self.quantizer is None or self.tail.rule == "minikv":
            return self.tail.length
        return self.quantizer.block

    @property
    def tail_keep(self) -> int:
        """Newest tokens that stay in full precision after a flush."""
        return 0 if self.tail.rule == "minikv" else self.tail.length
