"""The components of a method, and what they are given.

A component is a class whose fields are its settings: a `Scorer`, a `Budget` or `ScoredBudget`, a `Quantizer`. Subclass
one and put an instance into a `Method`. All are frozen values.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, dataclass_transform

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from minikv_jax import checks, fields
from minikv_jax.fields import setting
from minikv_jax.models.config import ModelConfig
from minikv_jax.packing import Packing

Kind = Literal["keys", "values"]

MAX_TOKENS = 1 << 24  # of a budget or a cache: more than any model has positions, and sums stay within 32 bits
MAX_WINDOW = 1 << 16  # tokens that a scorer looks at or ahead to, one after the other
METHOD_FIELDS = (
    *("name", "citation", "scorer", "heavy", "recent"),
    *("sinks", "budget", "evict_every", "quantizer", "tail"),
)  # of `Method`: `--set` knows these names already


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, setting))
class Component:
    """Part of a method: a subclass becomes a frozen dataclass, whose fields are its settings.

    Every setting has a default, an int, float, str or bool, and takes what is of its type (an int will do for a float,
    NaN and infinity will not). `lag: int = minikv_jax.setting(default=128, at_least=1, at_most=4096)` takes less. A
    value of another kind is refused when an instance is made.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
            _check_setting(cls, field)

    def __post_init__(self) -> None:
        fields.check(self)


def _check_setting(component: type, field: dataclasses.Field[Any]) -> None:
    """Raises ValueError for a setting that `--set` could not reach, or that stands where a method is expected."""
    what = f"setting {field.name!r} of {component.__name__}"
    if field.name in METHOD_FIELDS:
        raise ValueError(f"{what}: a Method has a field of that name; expected another")
    if any(callable(getattr(base, field.name, None)) for base in component.__mro__[1:]):
        raise ValueError(f"{what} hides a method of {component.__mro__[1].__name__}: expected another name")
    is_required = field.default is field.default_factory is dataclasses.MISSING
    if not is_required and fields.accepts(field) is None:
        raise ValueError(f"{what}: expected a default that is an int, float, str or bool (a ClassVar is no setting)")


def settings(component: type[Component] | Component) -> dict[str, Any]:
    """The settings of a class with their defaults, or those of an instance with their values."""
    if isinstance(component, type):
        return {field.name: field.default for field in dataclasses.fields(component)}  # pyright: ignore[reportArgumentType]
    return {field.name: getattr(component, field.name) for field in dataclasses.fields(component)}  # pyright: ignore[reportArgumentType]


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

    cap: float = setting(default=2.0, at_least=1, at_most=1024)

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

    On a device mesh, `encode` and `decode` are given each device's own rows and KV heads (`meshes.own_heads`).

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
