"""`Method`: a frozen value composed of a scorer, two budgets, a budget rule, a quantizer and a tail.

Equal methods compile once, and `dataclasses.replace` changes any part of a method. Names (`registry.py`) exist only for
the command line and for files.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, dataclass_transform

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from minikv_jax import checks, fields
from minikv_jax.fields import setting
from minikv_jax.methods.base import (
    MAX_TOKENS,
    MAX_WINDOW,
    Budget,
    Component,
    FunctionBudget,
    FunctionScorer,
    LayerInputs,
    NoScores,
    Quantizer,
    Refit,
    ScoredBudget,
    Scorer,
    Uniform,
)
from minikv_jax.packing import MAX_BLOCK

Length = TypeVar("Length", int, Array)
T = TypeVar("T")

MAX_LOOKAHEAD = 1024  # drafted tokens
SHARE_UNITS = 10000  # a share is a whole number of 1 / SHARE_UNITS


@dataclasses.dataclass(frozen=True)
class Share:
    """A budget given as a fraction of the prompt's tokens.

    Counts use whole units of 1/10000, so that a static capacity and a traced count always agree.

    Attributes:
      fraction: a float in 0..1.

    Raises:
      ValueError: not a float, or out of range.
    """

    fraction: float

    def __post_init__(self) -> None:
        value = self.fraction
        if isinstance(value, bool) or not isinstance(value, float | np.floating) or not 0 <= value <= 1:
            raise ValueError(f"Share({value!r}): expected a float in 0..1")
        object.__setattr__(self, "fraction", float(value))

    @property
    def units(self) -> int:
        """Fraction in units of 1/10000."""
        return round(self.fraction * SHARE_UNITS)

    def tokens(self, length: Length) -> Length:
        """Number of tokens granted to a row of `length` tokens: `floor(length * fraction)`."""
        units = self.units
        return length // SHARE_UNITS * units + length % SHARE_UNITS * units // SHARE_UNITS  # exact within 32 bits

    def granted(self, length: Length) -> Length:
        """Same as `tokens`, because a fraction of a row never exceeds it."""
        return self.tokens(length)  # pyright: ignore[reportReturnType]  (Length is Length)

    def __bool__(self) -> bool:
        return self.fraction > 0

    def __str__(self) -> str:
        return str(self.fraction)


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A budget given as a number of tokens.

    Attributes:
      count: an int in 0..16777216.

    Raises:
      ValueError: not an int, or out of range.
    """

    count: int = setting(kind=int, at_least=0, at_most=MAX_TOKENS)

    def __post_init__(self) -> None:
        fields.check(self)

    def tokens(self, length: Length) -> Length:
        """Number of tokens granted to a row of `length` tokens: the count, or the whole row if it is shorter."""
        return min(self.count, length) if isinstance(length, int) else jnp.minimum(self.count, length)

    def granted(self, length: Length) -> Length:
        """Same as the count, even if the row is shorter: with `evict_every`, the row grows up to it."""
        return self.count if isinstance(length, int) else jnp.full_like(length, self.count)  # pyright: ignore[reportReturnType]

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        return str(self.count)


Amount = Share | Tokens
HEADS = "expected pairs of a layer and a KV head, both counted from 0"
AMOUNT = f"expected a share (float in 0..1) or a token count (int in 0..{MAX_TOKENS})"


def to_amount(value: Amount | float | int) -> Amount:
    """Converts a budget: a float is a share, an int a count. Raises ValueError for anything else."""
    if isinstance(value, Share | Tokens):
        return value
    try:
        is_count = isinstance(value, int | np.integer) and not isinstance(value, bool)
        return Tokens(int(value)) if is_count else Share(value)
    except ValueError as error:
        raise ValueError(AMOUNT) from error


class Tail(Component):
    """The newest tokens of a quantised cache, which stay in full precision (MiniKV section 3.3; KIVI algorithm 1).

    Attributes:
      length: tokens, a multiple of the quantizer's packing block. The sinks come on top.
      rule: "minikv" packs the whole tail when it has `length` tokens; of the prompt, it leaves only what does not fill
        a packing block. "kivi" quantises as KIVI's code does: keys in whole runs of `length`, so that the rest of a
        division by `length` stays, and values one by one, so that the newest `length` stay. Blocks are packed later
        (`docs/packed-layout.md`).
    """

    length: int = setting(default=128, at_least=1, at_most=MAX_WINDOW)
    rule: str = setting(default="minikv", choices=("minikv", "kivi"))


def to_scorer(value: Scorer | Callable[[LayerInputs], Array]) -> Scorer:
    """Returns a scorer as given, or wraps a function `score(inputs)`. Raises ValueError for anything else."""
    if isinstance(value, Scorer):
        return value
    if isinstance(value, type) or not callable(value):
        raise ValueError("expected an instance of a Scorer class, or a function of LayerInputs")
    return FunctionScorer(function=value)


def to_budget(value: Budget | ScoredBudget | Callable[[int], Sequence[float]]) -> Budget | ScoredBudget:
    """Returns a budget rule as given, or wraps a function `weights(num_layers)`. Else raises ValueError."""
    if isinstance(value, Budget | ScoredBudget):
        return value
    if isinstance(value, type) or not callable(value):
        raise ValueError("expected an instance of a Budget or ScoredBudget class, or a function of num_layers")
    return FunctionBudget(function=value)


def to_heads(value: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Returns pairs (layer, head) in order. Raises ValueError for anything else, or for a pair that comes twice."""
    try:
        pairs = sorted((checks.integer("layer", layer, 0), checks.integer("head", head, 0)) for layer, head in value)
    except (TypeError, ValueError) as error:
        raise ValueError(HEADS) from error
    if twice := [pair for pair, next_pair in itertools.pairwise(pairs) if pair == next_pair]:
        raise ValueError(f"{twice[0]} comes twice: expected each head once")
    return tuple(pairs)


def _field(*, default: Any, converter: Callable[[Any], Any]) -> Any:
    """Declares a field that is converted when an instance is made. Type checkers know the name `converter`."""
    return dataclasses.field(default=default, metadata={"converter": converter})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, _field, setting))
def _value(cls: type[T]) -> type[T]:
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


@_value
class Method:
    """A KV-cache compression method: selects the tokens to keep, and stores them.

    Tokens are selected once, at prefill, per layer and KV head. Every generated token is kept, unless `evict_every` is
    set. Change a part with `dataclasses.replace`. By default a method keeps everything in the model's dtype.

    Attributes:
      name: name of the method; not part of its identity.
      citation: source of the method; not part of its identity.
      scorer: a `Scorer`, or a function `score(inputs)`, that scores the prompt's tokens.
      heavy: budget of top-scored tokens ("heavy hitters", H2O, arXiv 2306.14048): a float is a share of the prompt
        in 0..1, an int a number of tokens.
      recent: budget of newest tokens, a share or a number likewise.
      sinks: number of leading tokens that are always kept, in full precision, on top of the budgets (StreamingLLM,
        arXiv 2309.17453).
      budget: a `Budget` or `ScoredBudget`, or a function `weights(num_layers)`, that spreads `heavy` over layers.
      evict_every: number of new tokens after which a layer is cut back to its budget; None never evicts.
      quantizer: a `Quantizer` that stores keys and values; None keeps them in the model's dtype.
      tail: the newest tokens, which are not quantised.
      refit: a `Refit` that changes the values of the kept prompt tokens; None keeps them.
      lookahead: number of tokens that are drafted after the prompt with the compressed cache, before the prompt runs
        once more with the draft after it. The scorer then sees the drafted queries as the newest ones. The draft itself
        is dropped (Lookahead Q-Cache, arXiv 2505.20334). It stops at an end-of-sequence token; 0 drafts nothing.
      retrieval_heads: pairs (layer, KV head) that keep all tokens of the prompt that the layer's window lets them see,
        whatever the budgets (DuoAttention, arXiv 2410.10819). They depend on the model: `minikv retrieval-heads`
        finds them.

    Raises:
      ValueError: a value that is not accepted, or values that do not go together: shares that sum to more than 1, a
        `heavy` budget without a scorer, a tail that the quantizer's block does not divide, `evict_every` with a
        quantizer, without a budget, or with a scorer that has no `update`; `lookahead` where scores choose no token
        or with a scorer that repeats the prompt;
        `retrieval_heads` with `evict_every`, or where all heads keep all tokens.
    """

    name: str = dataclasses.field(default="custom", compare=False)
    citation: str = dataclasses.field(default="", compare=False)

    scorer: Scorer = _field(default=NoScores(), converter=to_scorer)
    heavy: Amount = _field(default=Share(0.0), converter=to_amount)
    recent: Amount = _field(default=Share(1.0), converter=to_amount)
    sinks: int = setting(default=0, at_least=0, at_most=MAX_TOKENS)
    budget: Budget | ScoredBudget = _field(default=Uniform(), converter=to_budget)
    evict_every: int | None = setting(default=None, kind=int, at_least=1, at_most=MAX_TOKENS)

    quantizer: Quantizer | None = None
    tail: Tail = Tail()
    refit: Refit | None = None
    lookahead: int = setting(default=0, at_least=0, at_most=MAX_LOOKAHEAD)
    retrieval_heads: tuple[tuple[int, int], ...] = _field(default=(), converter=to_heads)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            try:
                object.__setattr__(self, field.name, field.metadata.get("converter", lambda same: same)(value))
            except ValueError as error:
                raise ValueError(f"{field.name}={value!r}: {error}") from error
        fields.check(self)
        shares = [budget.units for budget in (self.heavy, self.recent) if isinstance(budget, Share)]
        if sum(shares) > SHARE_UNITS:
            raise ValueError(f"heavy={self.heavy} + recent={self.recent}: shares of the prompt may not sum over 1")
        if self.heavy and isinstance(self.scorer, NoScores):
            raise ValueError(f"heavy={self.heavy} needs a scorer, such as H2O(): NoScores() ranks no token")
        if self.quantizer is not None:
            self._check_storage(self.quantizer)
        if not isinstance(self.tail, Tail):
            raise ValueError(f"tail={self.tail!r}: expected a Tail")
        if self.refit is not None and not isinstance(self.refit, Refit):
            raise ValueError(f"refit={self.refit!r}: expected a Refit or None")
        if self.lookahead and not self.scores_choose:
            raise ValueError(f"lookahead={self.lookahead} where scores choose no token: expected a heavy budget")
        if self.lookahead and self.scorer.needs_repeat:
            raise ValueError(f"lookahead={self.lookahead} with {type(self.scorer).__name__}: it repeats the prompt")
        if self.retrieval_heads and self.keeps_all:
            raise ValueError(f"retrieval_heads={self.retrieval_heads} with recent=1.0: all heads keep all tokens")
        if self.evict_every is not None:
            self._check_eviction()

    def _check_storage(self, quantizer: Quantizer) -> None:
        if not isinstance(quantizer, Quantizer):
            raise ValueError(f"quantizer={quantizer!r}: expected a Quantizer or None")
        kind = type(quantizer).__name__
        try:
            block = quantizer.block
        except Exception as error:  # whatever a user's property may raise
            raise ValueError(f"{kind}.block fails: {type(error).__name__}: {error}") from error
        if MAX_BLOCK % checks.integer(f"{kind}.block", block, 1):
            raise ValueError(f"{kind}.block={block}: expected a divisor of {MAX_BLOCK}")
        if self.tail.length % block:
            raise ValueError(f"tail.length={self.tail.length}: expected a multiple of {kind}'s packing block {block}")

    def _check_eviction(self) -> None:
        every = f"evict_every={self.evict_every}"
        if self.quantizer is not None:
            raise ValueError(
                f"{every} with {type(self.quantizer).__name__}: only full-precision tokens can leave, those of a "
                "packed block share their metadata"
            )
        if self.retrieval_heads:
            raise ValueError(f"{every} with retrieval_heads={self.retrieval_heads}: these keep all tokens")
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
    def scores_choose(self) -> bool:
        """Whether some tokens are kept by their scores, and others not."""
        return bool(self.heavy) and not self.keeps_all

    @property
    def of_retrieval_heads(self) -> Method:
        """The method of the retrieval heads: all tokens, stored as by this one."""
        everything = Method(quantizer=self.quantizer, tail=self.tail, sinks=self.sinks)
        return dataclasses.replace(everything, name=self.name, citation=self.citation)

    @property
    def of_other_heads(self) -> Method:
        """The method of heads that are no retrieval heads."""
        return dataclasses.replace(self, retrieval_heads=())

    @property
    def runs_twice(self) -> bool:
        """Whether a prompt runs a second time, with tokens after it, before tokens are chosen."""
        return bool(self.lookahead) or (self.scorer.needs_repeat and self.scores_choose)

    def longest_prompt(self, positions: int) -> int:
        """Most tokens of a prompt that leave room among a model's positions for those after it in its second run."""
        return positions - self.lookahead if self.lookahead or not self.runs_twice else positions // 2

    @property
    def flush_block(self) -> int:
        """Number of tokens that leave a full tail at once."""
        if self.quantizer is None or self.tail.rule == "minikv":
            return self.tail.length
        return self.quantizer.block

    @property
    def tail_keep(self) -> int:
        """Number of newest tokens that stay in full precision after a flush."""
        return 0 if self.tail.rule == "minikv" else self.tail.length
