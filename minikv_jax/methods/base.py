"""Components of a method, and their inputs: frozen values of classes whose fields are their settings.

Subclass a `Scorer`, `Budget`, `ScoredBudget`, `Quantizer` or `Refit`, and pass an instance to `Method`.
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
from minikv_jax.methods.inputs import LayerInputs
from minikv_jax.models.config import ModelConfig
from minikv_jax.packing import Packing

Kind = Literal["keys", "values"]

MAX_TOKENS = 1 << 24  # in a budget or a cache: more than any model has positions, and sums stay within 32 bits
MAX_WINDOW = 1 << 16  # consecutive tokens that a scorer looks at or ahead to
METHOD_FIELDS = (
    *("name", "citation", "scorer", "heavy", "recent"),
    *("sinks", "budget", "evict_every", "quantizer", "tail", "refit", "lookahead"),
)  # fields of `Method`, which `--set` also accepts


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, setting))
class Component:
    """Base of all parts of a method. A subclass becomes a frozen dataclass, whose fields are its settings.

    Every setting has a default that is an int, float, str or bool, and accepts values of that type. A float also
    accepts an int, but neither NaN nor infinity. `minikv_jax.setting` narrows the accepted values:
    `lag: int = minikv_jax.setting(default=128, at_least=1, at_most=4096)`.

    Raises:
      ValueError: a class with a setting that has no such default, or hides a method or a field of `Method`; an instance
        with a value that is not accepted.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
            _check_setting(cls, field)

    def __post_init__(self) -> None:
        fields.check(self)


def _check_setting(component: type, field: dataclasses.Field[Any]) -> None:
    """Raises ValueError for a setting that `--set` cannot reach, or that hides a method of the class."""
    what = f"setting {field.name!r} of {component.__name__}"
    if field.name in METHOD_FIELDS:
        raise ValueError(f"{what}: a Method has a field of that name; expected another")
    if any(callable(getattr(base, field.name, None)) for base in component.__mro__[1:]):
        raise ValueError(f"{what} hides a method of {component.__mro__[1].__name__}: expected another name")
    is_required = field.default is field.default_factory is dataclasses.MISSING
    if not is_required and fields.accepts(field) is None:
        raise ValueError(f"{what}: expected a default that is an int, float, str or bool (a ClassVar is no setting)")


def settings(component: type[Component] | Component) -> dict[str, Any]:
    """Returns the settings of a class with their defaults, or of an instance with their values."""
    if isinstance(component, type):
        return {field.name: field.default for field in dataclasses.fields(component)}  # pyright: ignore[reportArgumentType]
    return {field.name: getattr(component, field.name) for field in dataclasses.fields(component)}  # pyright: ignore[reportArgumentType]


class Scorer(Component, abc.ABC):
    """Scores every prompt token, per layer, row and KV head. Tokens with higher scores are kept first.

    Attributes:
      needs_column_sums: whether `score` reads `LayerInputs.column_sums`, a second pass over the prefill's attention.
      needs_repeat: whether `score` sees each prompt twice, the second time right after the first.
      needs_output_projection: whether `score` or `rescore` reads `LayerInputs.output_projection`.
      vote_power: power of the softmax weights that `LayerInputs.votes` sums.
    """

    needs_column_sums: ClassVar[bool] = False
    needs_repeat: ClassVar[bool] = False
    needs_output_projection: ClassVar[bool] = False
    vote_power: ClassVar[int] = 1

    @property
    def vote_windows(self) -> tuple[int, ...]:
        """Numbers of last queries whose `LayerInputs.votes` the scorer reads."""
        return ()

    @abc.abstractmethod
    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        """Scores the tokens of one layer. Traced by `jax.jit`.

        Args:
          inputs: queries, keys and values of the prompt.

        Returns:
          A floating-point score per token. Sinks and recent tokens stay whatever their scores, and padding may score
          anything. NaN counts as the lowest score; evaluations report it.
        """

    @property
    def first_share(self) -> float:
        """Fraction of the heavy budget that is chosen by `score`; `rescore` chooses the rest."""
        return 1.0

    def rescore(self, inputs: LayerInputs, scores: Float[Array, "B K T"]) -> Float[Array, "B K T"]:
        """Scores the tokens anew for the rest of the heavy budget. Needed if `first_share` is below 1.

        Args:
          inputs: the prompt, perhaps without column sums, votes and the layer's number.
          scores: float32, what `score` returned.

        Returns:
          A floating-point score per token. Those chosen by `score` stay whatever they get.
        """
        raise NotImplementedError

    def update(self, scores: Float[Array, "B K C"], weights: Float[Array, "B K C"]) -> Float[Array, "B K C"]:
        """Updates the scores after a decode step. Needed for `Method.evict_every`.

        Args:
          scores: float32, scores of the cache's `C` slots; 0 for a new token.
          weights: float32, attention that the slots received in this step, summed over the query heads of a KV head.

        Returns:
          The new scores.
        """
        raise NotImplementedError

    @property
    def can_update(self) -> bool:
        """Whether the scorer defines `update`."""
        return type(self).update is not Scorer.update


class KeptTokens(NamedTuple):
    """The prompt tokens that a layer keeps, in order of position. Slots beyond a row's tokens are filler.

    Attributes:
      keys: float32, as decoding will read them: dequantised, where they are packed.
      values: float32, as the prompt had them; zero in filler slots.
      positions: int32, from 0; one past the prompt's array in filler slots.
      lengths: int32, tokens of the prompt per row; `LayerInputs.lengths` also counts drafted or repeated ones.
    """

    keys: Float[Array, "B K M H"]
    values: Float[Array, "B K M H"]
    positions: Int[Array, "B K M"]
    lengths: Int[Array, "B"]


class Refit(Component, abc.ABC):
    """Changes the values of the kept tokens, so that attention over them comes closer to attention over all."""

    @abc.abstractmethod
    def values(self, inputs: LayerInputs, kept: KeptTokens) -> Float[Array, "B K M H"]:
        """Computes floating-point values for the tokens that a layer keeps; filler may get any. Traced by `jax.jit`.

        `inputs` has no column sums and no layer number.
        """


class NoScores(Scorer):
    """Gives all tokens the same score: only their positions decide (StreamingLLM, or no eviction at all)."""

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        batch, tokens, kv_heads, _ = inputs.k.shape
        return jnp.zeros((batch, kv_heads, tokens), jnp.float32)


class FunctionScorer(Scorer):
    """Wraps a function `score(inputs)` as a scorer."""

    function: Callable[[LayerInputs], Array]

    def score(self, inputs: LayerInputs) -> Float[Array, "B K T"]:
        return self.function(inputs)


class Budget(Component, abc.ABC):
    """Spreads the heavy budget over layers, in proportion to a weight per layer."""

    @abc.abstractmethod
    def weights(self, num_layers: int) -> Sequence[float]:
        """Weighs the layers.

        Args:
          num_layers: number of the model's layers.

        Returns:
          One finite, non-negative number per layer, not all zero. Only their ratios count.
        """


class Uniform(Budget):
    """Gives every layer the same budget."""

    def weights(self, num_layers: int) -> list[float]:
        return [1.0] * num_layers


class FunctionBudget(Budget):
    """Wraps a function `weights(num_layers)` as a budget rule."""

    function: Callable[[int], Sequence[float]]

    def weights(self, num_layers: int) -> Sequence[float]:
        return self.function(num_layers)


class ScoredBudget(Component, abc.ABC):
    """Spreads the heavy budget over layers by their scores, in the compiled prefill after the last layer.

    Attributes:
      cap: no layer gets more than this multiple of the mean budget. It determines the allocated bytes.
    """

    cap: float = setting(default=2.0, at_least=1, at_most=1024)

    @abc.abstractmethod
    def weights(self, scores: Sequence[Float[Array, "B K T"]], lengths: Int[Array, "B"]) -> Float[Array, "L B"]:
        """Weighs the layers of each row. Traced by `jax.jit`.

        Args:
          scores: float32 scores of every layer; padding may hold anything.
          lengths: int32, valid tokens per row.

        Returns:
          Non-negative floating-point weights. Only the ratios between layers count.
        """


class Operand(NamedTuple):
    """Tells a quantizer whether it has keys or values, and of which layer.

    Attributes:
      kind: "keys" or "values".
      layer: number of the layer if the quantizer sets `by_layer`, else None.
    """

    kind: Kind
    layer: int | None = None


class Quantizer(Component, abc.ABC):
    """Stores keys and values in few bits. Subclasses define at least `encode` and `decode`.

    On a device mesh, `encode` and `decode` get each device's own rows and KV heads (`meshes.own_heads`).

    Attributes:
      k_bits, v_bits: bits per channel of a key and of a value.
      choices: accepted values of `k_bits` and `v_bits`.
      by_layer: whether the quantizer reads `Operand.layer`. If not, layers of equal shapes share a program.
      by_head: whether `encode` or `decode` knows the number of a KV head. If so, heads cannot be stored in groups.
      kernel_packs: whether `encode` equals `minikv_jax.packing.encode_minmax` with `packing(kind)`, so that a kernel
        may do it instead. False by default in a subclass that defines `encode`.
      kernel_reads: whether `decode` equals `minikv_jax.packing.dequantize`. False by default in a subclass that defines
        `decode`.
    """

    choices: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 8)
    by_layer: ClassVar[bool] = False
    by_head: ClassVar[bool] = False
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
        """Number of tokens that are packed together. It must divide `MAX_BLOCK` (1024) and `Tail.length`."""
        return 32

    def operand(self, kind: Kind, layer: int) -> Operand:
        """Returns the operand for the keys or the values of layer number `layer`."""
        return Operand(kind, layer if self.by_layer else None)

    def bits(self, kind: Kind) -> int:
        """Returns `k_bits` or `v_bits`."""
        return self.k_bits if kind == "keys" else self.v_bits

    def packing(self, kind: Kind) -> Packing:
        """Returns the packing of keys or values, if kernels can pack or read them.

        Raises:
          NotImplementedError: the quantizer has a layout of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} has a layout of its own")

    @abc.abstractmethod
    def encode(self, x: Float[Array, "B K S H"], operand: Operand) -> Any:
        """Encodes keys or values. Traced by `jax.jit`.

        Args:
          x: `S` tokens in the model's dtype, `S` being a multiple of `block`; in the basis of `rotation`.
          operand: keys or values, and of which layer.

        Returns:
          A `QuantizedArray`, or any pytree of arrays `[B, K, S / r, ...]`. Each array has its own `r`, which divides
          `block`. A block's result may not depend on other blocks.
        """

    @abc.abstractmethod
    def decode(self, stored: Any, operand: Operand) -> Float[Array, "B K S H"]:
        """Decodes what `encode` returned. Traced by `jax.jit`.

        Args:
          stored: any whole number of blocks.
          operand: keys or values, and of which layer.

        Returns:
          The tokens in any floating-point dtype; float32 is rounded only once.
        """

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"] | None:
        """Returns the basis of the cache: an orthogonal `R`, or None for no rotation.

        The whole cache, tail included, then holds `k @ R` (or `v @ R`). Queries are rotated as the keys are, and the
        output is rotated back, so that attention is unchanged.

        Args:
          operand: keys or values, and of which layer.
          head_dim: `H`.
        """
        del operand, head_dim
        return None

    def check(self, model: ModelConfig) -> None:
        """Raises ValueError if the quantizer does not fit the model. Shapes are checked elsewhere (`contracts.py`)."""
        del model
