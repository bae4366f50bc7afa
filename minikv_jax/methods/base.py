"""The extension points: scorers, budget rules and quantisers, each a small protocol with a registry of names.

A scheme is registered under a name, and the name works wherever a `CacheConfig` does. What the library ships is
registered in the same way (`selection.py`, `quantizers.py`); `docs/schemes.md` shows a scheme of each kind. What a
scheme must keep to is checked on abstract shapes (`check`) before any work starts.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from minikv_jax.methods.config import CacheConfig
    from minikv_jax.models.config import ModelConfig

Option = int | float | str  # a setting of a scheme's own: `CacheConfig.options`
Kind = Literal["keys", "values"]

MAX_BLOCK = 1024  # tokens read at a time from the packed region: a quantiser's block divides it


class ScorerInputs(NamedTuple):
    """What a scorer may read of one layer's prefill. RoPE is already applied; rows are right-padded to `T`.

    Attributes:
      q, k, v: in the model's dtype; what lies beyond a row's length may be anything, NaN too.
      lengths: valid tokens per row.
      column_sums: float32, of the causal softmax map over all queries, if the scorer asks for them, else None.
      window: the layer's sliding window.
      layer: the layer's number, a traced int32 scalar: layers of equal shapes may share a program.
      frequencies: float32 `[H/2]`, radians per position by which RoPE turned channels (i, i + H/2); None if unknown.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    lengths: Int[Array, "B"]
    column_sums: Float[Array, "B K T"] | None
    window: int | None
    layer: Int[Array, ""] | int = 0
    frequencies: Float[Array, "F"] | None = None


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A score per key: `score(inputs, config) -> float [B, K, T]`, higher is kept first. Padding may score anything.

    Sinks and recent tokens stay whatever they score. NaN counts as the lowest score, and evaluations report it.

    `update(scores, weights, config) -> float [B, K, C]`, if there is one, takes a decode step in: the `scores` of the
    cache's `C` slots (0 for a new token) and the attention `weights` that they got, summed over the KV head's queries.
    """

    score: Callable[[ScorerInputs, CacheConfig], Array]
    needs_column_sums: bool = False
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)
    update: Callable[[Array, Array, CacheConfig], Array] | None = None


@dataclasses.dataclass(frozen=True)
class Budget:
    """How the heavy budget is spread over layers: non-negative weights, of which only the ratios count.

    `weights(config, num_layers)` gives one number per layer. If the rule `needs_scores`, it is
    `weights(config, scores, lengths) -> float [L, B]` instead, with each layer's scores `[B, K, T]`, and runs inside
    the compiled prefill, after all layers.
    """

    weights: Callable[..., Any]
    needs_scores: bool = False
    options: Mapping[str, Option] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Operand:
    """What a quantiser is given: the keys or the values of one layer, under a method."""

    kind: Kind
    number: int
    config: CacheConfig

    @property
    def layer(self) -> int:
        """The layer's number, for a quantiser that says `by_layer`; ValueError for others."""
        if not QUANTIZERS[self.config.quantizer].by_layer:
            raise ValueError("operand.layer is read: a quantiser that differs between layers sets by_layer = True")
        return self.number

    @property
    def bits(self) -> int:
        """`k_bits` or `v_bits`."""
        bits = self.config.k_bits if self.kind == "keys" else self.config.v_bits
        assert bits is not None  # a config has both or neither
        return bits


class Quantizer(abc.ABC):
    """How keys and values are stored. Subclass it and give at least `quantize` and `dequantize`.

    Attributes:
      bits: what `k_bits` and `v_bits` may be.
      by_layer: whether it reads `Operand.layer`. If not, layers of equal shapes may share a program.
      options: settings of its own and their defaults (`register_quantizer`).
    """

    bits: tuple[int, ...] = (1, 2, 3, 4, 8)
    by_layer: bool = False
    options: Mapping[str, Option] = {}

    def block(self, config: CacheConfig) -> int:
        """Tokens that enter the packed region together: a divisor of `MAX_BLOCK` and of `residual_length`."""
        del config
        return 32

    @abc.abstractmethod
    def quantize(self, x: Float[Array, "B K S H"], operand: Operand) -> Any:
        """What to store of `S` tokens, a multiple of `block`.

        Returns:
          A `QuantizedArray`, which the kernels can read too, or any pytree of arrays `[B, K, S / r, ...]` where `r`
          divides the block, each array with its own `r`. Blocks are quantised independently of one another.
        """

    @abc.abstractmethod
    def dequantize(self, stored: Any, operand: Operand) -> Float[Array, "B K S H"]:
        """The tokens that `stored`, any whole number of blocks, stands for."""

    def check(self, config: CacheConfig, model: ModelConfig) -> None:
        """Raises ValueError where the quantiser cannot serve this method or model; shapes are checked without it."""
        del config, model

    def rotation(self, operand: Operand, head_dim: int) -> Float[Array, "H H"] | None:
        """An orthogonal `R`: the cache then holds `k @ R` (or `v @ R`), its tail too.

        Queries are rotated as the keys are, and the output is rotated back, so that attention is unchanged.
        """
        del operand, head_dim
        return None


T = TypeVar("T")


class Registry(Generic[T]):
    """Schemes of one kind by name."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._built_in: frozenset[str] = frozenset()

    def __getitem__(self, name: str) -> T:
        self.require(name)
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        self._load_built_ins()
        return iter(self._entries)

    def _load_built_ins(self) -> None:
        """Imports what the library registers itself, on first use, whatever was imported before."""
        if not self._built_in:
            importlib.import_module("minikv_jax.methods.lookup")

    def require(self, name: object) -> None:
        """Raises ValueError listing the names there are, unless `name` is one of them."""
        self._load_built_ins()
        if name not in self._entries:
            raise ValueError(f"{self.kind}={name!r}: expected one of {', '.join(self._entries)}")

    def add(self, name: str, entry: T) -> None:
        """Registers `entry`; a name of the user's own may be taken again, one of the library's may not."""
        if not isinstance(name, str) or not name or set(name) & set(":,= \n"):
            raise ValueError(f"{self.kind}={name!r}: expected a name without spaces, ':', ',' and '='")
        if name in self._built_in:
            raise ValueError(f"{self.kind}={name!r} is the library's own: choose another name")
        if name in self._entries:  # compiled programs know a scheme by its name
            jax.clear_caches()
            _check.cache_clear()
        self._entries[name] = entry

    def seal(self) -> None:
        """Protects the names registered so far."""
        self._built_in = frozenset(self._entries)

    def is_built_in(self, name: str) -> bool:
        return name in self._built_in


SCORERS: Registry[Scorer] = Registry("scorer")
BUDGETS: Registry[Budget] = Registry("budget")
QUANTIZERS: Registry[Quantizer] = Registry("quantizer")
METHODS: Registry[CacheConfig] = Registry("method")
_REGISTRIES = (SCORERS, BUDGETS, QUANTIZERS, METHODS)


def register_scorer(
    name: str,
    /,
    *,
    needs_column_sums: bool = False,
    update: Callable[[Array, Array, CacheConfig], Array] | None = None,
    **options: Option,
) -> Callable[[Callable[[ScorerInputs, CacheConfig], Array]], Callable]:
    """Registers the decorated function as `CacheConfig(scorer=name)`: see `Scorer`.

    Args:
      needs_column_sums: have the prefill give `ScorerInputs.column_sums`, a second pass over its attention.
      update: how the scores go on during generation, which `evict_every` needs.
      options: settings of the scorer's own and their defaults, read with `config.option(name)`.
    """

    def register(score: Callable[[ScorerInputs, CacheConfig], Array]) -> Callable:
        SCORERS.add(name, Scorer(score, needs_column_sums, options, update))
        return score

    return register


def register_budget(name: str, /, *, needs_scores: bool = False, **options: Option) -> Callable[[Callable], Callable]:
    """Registers the decorated function as `CacheConfig(budget=name)`: see `Budget`."""

    def register(weights: Callable) -> Callable:
        BUDGETS.add(name, Budget(weights, needs_scores, options))
        return weights

    return register


Q = TypeVar("Q", bound="type[Quantizer] | Quantizer")


def register_quantizer(name: str, /, **options: Option) -> Callable[[Q], Q]:
    """Registers a `Quantizer`, the decorated class or an instance, as `CacheConfig(quantizer=name)`."""

    def register(quantizer: Q) -> Q:
        instance = quantizer() if isinstance(quantizer, type) else quantizer
        if not isinstance(instance, Quantizer):
            raise ValueError(f"quantizer={name!r} is a {type(instance).__name__}: expected a minikv_jax.Quantizer")
        instance.options = options
        QUANTIZERS.add(name, instance)
        return quantizer

    return register


def register_method(config: CacheConfig) -> CacheConfig:
    """Makes `config` a method under its own name, as `minikv_jax.methods.lookup` are.

    Raises:
      ValueError: not a `CacheConfig`, or a name that is the library's own or has spaces, ':', ',' or '='.
    """
    from minikv_jax.methods.config import CacheConfig

    if not isinstance(config, CacheConfig):
        raise ValueError(f"method {config!r}: expected a CacheConfig, whose name it is registered under")
    METHODS.add(config.name, config)
    return config


def seal() -> None:
    """Protects everything registered so far: called once the library is imported."""
    for registry in _REGISTRIES:
        registry.seal()


def load_plugin(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Runs a Python file that registers schemes.

    Returns:
      The new names by kind: `{"scorer": ("mine",), "method": ("my-method",)}`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the file fails, with its line and the cause; or it registers nothing.
    """
    file = pathlib.Path(path).resolve()
    if not file.is_file():
        raise FileNotFoundError(f"plugin {os.fspath(path)} does not exist")
    METHODS._load_built_ins()
    before = [dict(registry._entries) for registry in _REGISTRIES]
    spec = importlib.util.spec_from_file_location(f"minikv_plugin_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"plugin {os.fspath(path)} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        del sys.modules[spec.name]
        raise ValueError(f"plugin {os.fspath(path)}{_cause(error, str(file))}") from error
    new = {
        registry.kind: names
        for registry, old in zip(_REGISTRIES, before, strict=True)
        if (names := tuple(name for name in registry if registry[name] is not old.get(name)))
    }
    if not new:
        raise ValueError(f"plugin {os.fspath(path)} registers nothing: no scorer, budget, quantizer or method")
    return new


def check(config: CacheConfig, model: ModelConfig) -> None:
    """Holds the schemes of a method against their contracts, for a model's shapes; nothing is computed.

    Raises:
      ValueError: naming the scheme, what it got, what it returned or raised, and what is expected.
    """
    heads = (model.num_attention_heads, model.num_key_value_heads, model.head_dim)
    if config.quantized:
        QUANTIZERS[config.quantizer].check(config, model)
    _check(config, *heads, model.num_hidden_layers)


@functools.lru_cache(maxsize=256)
def _check(config: CacheConfig, heads: int, kv_heads: int, head_dim: int, layers: int) -> None:
    _check_scorer(config, heads, kv_heads, head_dim)
    _check_budget(config, kv_heads, layers)
    if config.quantized:
        for operand in (Operand("keys", 0, config), Operand("values", 0, config)):
            _check_quantizer(operand, kv_heads, head_dim)


_ROWS, _TOKENS = 2, 96  # what schemes are tried on


def _check_scorer(config: CacheConfig, heads: int, kv_heads: int, head_dim: int) -> None:
    scorer = SCORERS[config.scorer]
    q = jax.ShapeDtypeStruct((_ROWS, _TOKENS, heads, head_dim), jnp.float32)
    k = jax.ShapeDtypeStruct((_ROWS, _TOKENS, kv_heads, head_dim), jnp.float32)
    lengths = jax.ShapeDtypeStruct((_ROWS,), jnp.int32)
    scores = jax.ShapeDtypeStruct((_ROWS, kv_heads, _TOKENS), jnp.float32)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    frequencies = jax.ShapeDtypeStruct((head_dim // 2,), jnp.float32)

    def run(q: Array, k: Array, lengths: Array, sums: Array, layer: Array, frequencies: Array) -> Array:
        column_sums = sums if scorer.needs_column_sums else None
        return scorer.score(ScorerInputs(q, k, k, lengths, column_sums, None, layer, frequencies), config)

    what = f"scorer {config.scorer!r}"
    out = _abstract(what, scorer.score, run, q, k, lengths, scores, layer, frequencies)
    _expect(what, out, scores.shape, "[B, K, T]")
    update = scorer.update
    if config.evict_every and update is not None:
        what += ": update"
        out = _abstract(what, update, lambda scores, weights: update(scores, weights, config), scores, scores)
        _expect(what, out, scores.shape, "[B, K, C]")


def _check_budget(config: CacheConfig, kv_heads: int, layers: int) -> None:
    rule = BUDGETS[config.budget]
    what = f"budget {config.budget!r}"
    if rule.needs_scores:
        scores = [jax.ShapeDtypeStruct((_ROWS, kv_heads, _TOKENS), jnp.float32)] * layers
        lengths = jax.ShapeDtypeStruct((_ROWS,), jnp.int32)
        out = _abstract(what, rule.weights, lambda *args: rule.weights(config, *args), scores, lengths)
        _expect(what, out, (layers, _ROWS), "[L, B]")
        return
    try:
        weights: Sequence[Any] = list(rule.weights(config, layers))
        valid = len(weights) == layers and all(math.isfinite(value) and value >= 0 for value in weights)
    except Exception as error:  # whatever a user's code may raise
        raise ValueError(f"{what} fails for {layers} layers{_cause(error, _file(rule.weights))}") from error
    if not valid or not sum(weights) > 0:
        raise ValueError(
            f"{what} gives {weights} for {layers} layers: expected {layers} weights, finite, not negative, not all zero"
        )


def _check_quantizer(operand: Operand, kv_heads: int, head_dim: int) -> None:
    config = operand.config
    quantizer, block = QUANTIZERS[config.quantizer], config.packing_block
    what = f"quantizer {config.quantizer!r}: {operand.kind}"

    def stored(tokens: int) -> tuple[Any, jax.ShapeDtypeStruct]:
        x = jax.ShapeDtypeStruct((_ROWS, kv_heads, tokens, head_dim), jnp.float32)
        return _abstract(what, quantizer.quantize, lambda x: quantizer.quantize(x, operand), x), x

    (one, x), (three, x_three) = stored(block), stored(3 * block)
    if jax.tree.structure(one) != jax.tree.structure(three) or not jax.tree.leaves(one):
        raise ValueError(f"{what}: expected quantize to return the same pytree of arrays for any number of tokens")
    for (path, leaf), other in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(three), strict=True):
        rows = leaf.shape[2] if len(leaf.shape) > 2 else 0
        expected = (_ROWS, kv_heads, 3 * rows, *leaf.shape[3:])
        if leaf.shape[:2] != (_ROWS, kv_heads) or not rows or block % rows or other.shape != expected:
            raise ValueError(
                f"{what}: quantize returns{jax.tree_util.keystr(path) or ' an array'} of shape {list(leaf.shape)} for "
                f"{list(x.shape)} and {list(other.shape)} for {list(x_three.shape)}: expected [B, K, S / r, ...] "
                f"where r divides the block of {block} tokens"
            )
    for given, values in ((one, x), (three, x_three)):
        out = _abstract(what, quantizer.dequantize, lambda stored: quantizer.dequantize(stored, operand), given)
        _expect(f"{what}: dequantize", out, values.shape, "[B, K, S, H]")
    rotation = quantizer.rotation(operand, head_dim)
    if rotation is not None:
        _check_rotation(what, rotation, head_dim)


def _check_rotation(what: str, rotation: Array, head_dim: int) -> None:
    _expect(f"{what}: rotation", rotation, (head_dim, head_dim), "[H, H]")
    matrix = np.asarray(rotation, np.float64)
    error = np.abs(matrix @ matrix.T - np.eye(head_dim)).max()
    if not error < 1e-4:
        raise ValueError(f"{what}: rotation is not orthogonal: R @ R.T differs from 1 by {error:.2g}")


def _abstract(what: str, scheme: Callable, function: Callable, *shapes: Any) -> Any:
    """The output shapes of a user's code, or one error that says where it fails."""
    try:
        return jax.eval_shape(function, *shapes)
    except Exception as error:
        given = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(shapes))
        raise ValueError(f"{what} fails on {given}{_cause(error, _file(scheme))}") from error


def _expect(what: str, out: Any, shape: tuple[int, ...], legend: str) -> None:
    if not hasattr(out, "shape") or not hasattr(out, "dtype"):
        raise ValueError(f"{what} returns a {type(out).__name__}: expected an array {legend}")
    if out.shape != shape or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"{what} returns {out.dtype}{list(out.shape)}: expected floating-point {list(shape)}, that is {legend}"
        )


def _file(function: Callable) -> str:
    code = getattr(function, "__code__", None)
    return "" if code is None else code.co_filename


def _cause(error: BaseException, file: str) -> str:
    """` (line 3): TypeError: ...`: the innermost line of `file` on the way to the error, and the error's first line."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines.append(error.lineno)
    place = f" ({pathlib.Path(file).name}, line {lines[-1]})" if lines else ""
    kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
    return f"{place}: {kind}{(str(error).strip().splitlines() or ['no message'])[0]}"
