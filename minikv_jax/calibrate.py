"""Learns a `Calibration`: clipping ranges of the groups, and a rotation of the keys and the values.

Layers are learned one by one, from what a method's cache holds of a few prompts. A layer's loss is the error of its
attention output for the tokens that follow the prompts, compared with attention over the same tokens in full precision.
So the loss measures what an error in a key or value costs, and needs no pass through the model. The forward pass uses
the method's own quantisation. Gradients pass straight through the rounding (Bengio et al. 2013) and reach zero points
and steps as in LSQ (Esser et al. 2020). Rotations are Cayley transforms of skew-symmetric matrices. They start from the
quantizer's own basis or from OSCAR's closed form, which without any step is a calibration of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from minikv_jax import packing
from minikv_jax.cache.capacity import capacities
from minikv_jax.checks import at_least, choice
from minikv_jax.layerwise import compress_layers, look_ahead, prefill_layers
from minikv_jax.methods import contracts, oscar
from minikv_jax.methods.base import Kind, Operand
from minikv_jax.methods.calibrated import Calibration, OperandCalibration, Ranges, clipped
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method
from minikv_jax.methods.quarot import Hadamard
from minikv_jax.models import windows
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.windows import Window
from minikv_jax.packing import Packing

LEARNABLE = ("ranges", "rotation")
STARTS = ("quantizer", "oscar")  # where rotations start
_STARTING_POINTS = (MinMax, Hadamard)  # quantizers that a calibrated one equals before anything is learned


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a calibration.

    Attributes:
      learn: parts to learn: "ranges", "rotation" or both.
      start: where rotations start: "quantizer", its own basis, or "oscar", the closed form of arXiv 2605.17757.
      steps: steps of the optimiser per layer, one text each; 0 leaves everything where it starts.
      rate: Adam's learning rate, between 0 and 1; it falls to 0 along a cosine.
      seed: seed of the order in which texts are drawn.
    """

    learn: tuple[str, ...] = ("rotation",)
    start: str = "quantizer"
    steps: int = 100
    rate: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        choice("start", self.start, STARTS)
        at_least(0, steps=self.steps)
        if not 0 < self.rate < 1:
            raise ValueError(f"rate={self.rate}: expected a number between 0 and 1")
        if not self.learn or set(self.learn) - set(LEARNABLE):
            raise ValueError(f"learn={','.join(self.learn)!r}: expected some of {', '.join(LEARNABLE)}")


class Learnt(NamedTuple):
    """A calibration and its losses: squared error of a layer's attention output, relative to the size of the output.

    Attributes:
      calibration: the ranges and rotations.
      before, after: `[L]`, mean loss over all texts, in the quantizer's own basis and after learning.
      curve: `[steps]`, mean loss over layers, on the text of each step.
    """

    calibration: Calibration
    before: np.ndarray
    after: np.ndarray
    curve: np.ndarray


def calibrate(
    model: Llama,
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
    method: Method,
    settings: Settings = Settings(),
    done: Callable[[int], None] = lambda layers: None,
) -> Learnt:
    """Learns ranges and rotations for a method's cache.

    Args:
      model: the model whose keys and values are stored.
      texts: pairs of a prompt and the tokens that follow it, as token ids; the lengths are the same in all texts.
      method: quantises with `MinMax` or `Hadamard`.
      settings: parts to learn, where to start, steps and learning rate.
      done: called after each layer with the number of finished layers.

    Returns:
      The calibration, and the losses before, during and after learning.

    Raises:
      ValueError: a method that does not fit the model, or that packs nothing of such prompts; no text; texts of
        different lengths; values that are not finite.
    """
    quantizer = check_method(model.config, method)
    if len({(len(prompt), len(after)) for prompt, after in texts}) != 1:
        raise ValueError("expected at least one text, and the same lengths of every prompt and of what follows")
    layers = []
    for number, samples in enumerate(_samples(model, texts, method)):
        if not samples.packed.any():
            raise ValueError(f"method {method.name!r} packs nothing of a prompt of {len(texts[0][0])} tokens")
        key = jax.random.fold_in(jax.random.key(settings.seed), number)
        window = model.window(number)
        learned = _learn_layer(samples, key, quantizer=quantizer, sinks=method.sinks, settings=settings, window=window)
        layers.append(jax.device_get(learned))
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(layers[-1])):
            hint = f": expected a rate below {settings.rate}" if settings.steps else ""
            raise ValueError(f"what is learnt of layer {number} is not finite{hint}")
        done(number + 1)
    calibration, before, after, curve = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return Learnt(calibration, before, after, curve.mean(axis=0))


def check_method(model: ModelConfig, method: Method) -> MinMax:
    """Returns the method's quantizer. Raises ValueError if that cannot be calibrated or does not fit the model."""
    quantizer = method.quantizer
    if not isinstance(quantizer, MinMax) or type(quantizer) not in _STARTING_POINTS:
        expected = " or ".join(kind.__name__ for kind in _STARTING_POINTS)
        raise ValueError(f"method {method.name!r} has quantizer={quantizer}: expected {expected}")
    if model.attn_logit_softcapping is not None or model.design.attention_sinks:
        raise ValueError(f"a model of type {model.model_type!r}: soft caps and attention sinks cannot be calibrated")
    if method.retrieval_heads:
        raise ValueError(
            f"method {method.name!r} has retrieval_heads: expected none, a learned rotation takes them afterwards"
        )
    contracts.check(method, model)
    return quantizer


class _Samples(NamedTuple):
    """One layer's keys and values of `W` texts, and the queries that read them.

    The first `M` slots hold kept prompt tokens. The last `Q` slots hold the tokens after the prompt, which ask.
    """

    q: Float[Array, "W Q N H"]
    k: Float[Array, "W K S H"]  # S = M + Q
    v: Float[Array, "W K S H"]
    positions: Int[Array, "W K S"]  # larger than all others if a slot is empty
    packed: Int[Array, "W"]  # number of quantised slots, which follow the sinks


def _samples(model: Llama, texts: Sequence[tuple[Sequence[int], Sequence[int]]], method: Method) -> list[_Samples]:
    """Collects each layer's samples as NumPy arrays."""
    by_text = []
    for prompt, after in texts:
        ids, length = np.array([[*prompt, *after]], np.int32), np.array([len(prompt)], np.int32)
        start = ids[:, : len(prompt)], length
        hidden, layers = prefill_layers(model, *start, method.scorer.needs_column_sums, None)
        layers, seen = look_ahead(model, method, start, hidden, layers, None)
        sizes = capacities(model.config, method, len(prompt), len(after))
        cache, kept, _ = compress_layers(model.config, method, layers, length, seen, sizes, None)
        _, whole = prefill_layers(model, ids, length + len(after), False, None)
        rows = [
            _sample(q, k, v, chosen.positions, part.packed.length, prompt=len(prompt))
            for (q, k, v, *_), (chosen,), part in zip(whole, kept, cache.parts, strict=True)
        ]
        by_text.append(jax.device_get(rows))
    return [jax.tree.map(lambda *rows: np.concatenate(rows), *layer) for layer in zip(*by_text, strict=True)]


@functools.partial(jax.jit, static_argnames="prompt")
def _sample(
    q: Float[Array, "1 T N H"],
    k: Float[Array, "1 T K H"],
    v: Float[Array, "1 T K H"],
    kept: Int[Array, "1 K M"],
    packed: Int[Array, "1"],
    *,
    prompt: int,
) -> _Samples:
    """Makes one text's sample from a run over all of its tokens, the first `prompt` of which were compressed."""
    tokens, kv_heads = k.shape[1:3]
    after = jnp.broadcast_to(jnp.arange(prompt, tokens), (1, kv_heads, tokens - prompt))
    source = jnp.concatenate([jnp.minimum(kept, prompt - 1), after], axis=-1)
    empty = jnp.where(kept < prompt, kept, tokens)
    k, v = (jnp.take_along_axis(x.swapaxes(1, 2), source[..., None], axis=2).astype(jnp.float32) for x in (k, v))
    return _Samples(q[:, prompt:].astype(jnp.float32), k, v, jnp.concatenate([empty, after], axis=-1), packed)


@functools.partial(jax.jit, static_argnames=("quantizer", "sinks", "settings", "window"))
def _learn_layer(
    samples: _Samples, key: Array, *, quantizer: MinMax, sinks: int, settings: Settings, window: Window | None
) -> tuple[Calibration, Array, Array, Array]:
    """Learns a layer's calibration. Returns it with the mean loss before and after, and the loss of every step."""
    texts, _, _, dim = samples.q.shape
    own = _basis("keys", quantizer, dim), _basis("values", quantizer, dim)
    bases = _oscar_bases(samples) if settings.start == "oscar" else own
    start = _nothing_learnt(samples.k.shape[1], dim, quantizer.group_size)

    def loss(free: Calibration, bases: tuple[Array, Array], sample: _Samples) -> Array:
        return _loss(_calibration(free, bases, settings.learn), sample, quantizer, sinks, window)

    def mean(free: Calibration, bases: tuple[Array, Array]) -> Array:
        return jnp.mean(lax.map(functools.partial(loss, free, bases), samples))

    def step(state: tuple[Any, Any], index: Array) -> tuple[tuple[Any, Any], Array]:
        free, moments = state
        value, slope = jax.value_and_grad(loss)(free, bases, jax.tree.map(lambda leaf: leaf[index], samples))
        change, moments = adam.update(slope, moments, free)
        return (optax.apply_updates(free, change), moments), value

    adam = optax.adam(optax.cosine_decay_schedule(settings.rate, max(settings.steps, 1)))
    order = jax.random.randint(key, (settings.steps,), 0, texts)
    (learnt, _), curve = lax.scan(step, (start, adam.init(start)), order)
    return _calibration(learnt, bases, settings.learn), mean(start, own), mean(learnt, bases), curve


def _basis(kind: Kind, quantizer: MinMax, dim: int) -> Float[Array, "H H"]:
    """Basis from which a rotation starts: that of the method's own quantizer."""
    rotation = quantizer.rotation(Operand(kind), dim)
    return jnp.eye(dim) if rotation is None else rotation


def _oscar_bases(samples: _Samples) -> tuple[Float[Array, "H H"], Float[Array, "H H"]]:
    """OSCAR's rotations of the keys and the values, by what the tokens after the prompts ask of the kept ones."""
    queries, slots = samples.q.shape[1], samples.positions.shape[-1]
    first_asking = samples.positions[..., slots - queries, None]
    stored = (jnp.arange(slots) < slots - queries) & (samples.positions < first_asking)
    return oscar.rotations(samples.q, samples.k, samples.v, stored)


def _nothing_learnt(heads: int, dim: int, group_size: int) -> Calibration:
    """Starting values of the free parameters, all zero: logarithms of the ranges, and matrices behind the rotations."""

    def operand(columns: int) -> OperandCalibration:
        return OperandCalibration(Ranges(*jnp.zeros((2, heads, columns))), jnp.zeros((dim, dim)))

    return Calibration(operand(dim), operand(dim // group_size))


def _calibration(free: Calibration, bases: tuple[Array, Array], learn: tuple[str, ...]) -> Calibration:
    """Turns free parameters into a calibration. Parameters that are not in `learn` get no gradient."""

    def operand(free: OperandCalibration, basis: Array) -> OperandCalibration:
        ranges = free.ranges if "ranges" in learn else lax.stop_gradient(free.ranges)
        turn = free.rotation if "rotation" in learn else lax.stop_gradient(free.rotation)
        skew, one = turn - turn.T, jnp.eye(turn.shape[0])
        cayley = jnp.linalg.solve(one + skew, one - skew)
        return OperandCalibration(
            Ranges(jnp.exp(ranges.low), jnp.exp(ranges.high)), jnp.matmul(basis, cayley, precision="highest")
        )

    keys, values = bases
    return Calibration(operand(free.keys, keys), operand(free.values, values))


def _loss(
    calibration: Calibration, sample: _Samples, quantizer: MinMax, sinks: int, window: Window | None
) -> Float[Array, ""]:
    """Squared error of one text's attention over its stored tokens, relative to the size of the exact output."""
    exact = _attend(sample, sample.k, sample.v, window)
    k = _stored(sample.k, sample.packed, calibration.keys, quantizer.packing("keys"), sinks)
    v = _stored(sample.v, sample.packed, calibration.values, quantizer.packing("values"), sinks)
    return jnp.sum((_attend(sample, k, v, window) - exact) ** 2) / jnp.sum(exact**2)


def _attend(sample: _Samples, k: Float[Array, "K S H"], v: Float[Array, "K S H"], window: Window | None) -> Array:
    """Attention output `[K, G, Q, H]` of the queries, whose tokens are in the last slots."""
    queries, heads, dim = sample.q.shape
    q = sample.q.reshape(queries, k.shape[0], heads // k.shape[0], dim)
    asking, positions = sample.positions[:, -queries:, None], sample.positions[:, None]  # [K, Q, 1] and [K, 1, S]
    seen = positions <= asking
    if window is not None:
        seen &= positions >= windows.oldest(window, asking)
    logits = jnp.einsum("qkgh,ksh->kgqs", q, k, precision="highest") * dim**-0.5
    weights = jax.nn.softmax(jnp.where(seen[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("kgqs,ksh->kgqh", weights, v, precision="highest")


def _stored(
    x: Float[Array, "K S H"], packed: Int[Array, ""], learnt: OperandCalibration, rule: Packing, sinks: int
) -> Float[Array, "K S H"]:
    """Tokens as they are read back from the cache: packed ones with their error, others exact."""
    slots = jnp.arange(x.shape[1])
    size = (x.shape[1] - sinks) // rule.block * rule.block
    turned = jnp.matmul(x[None, :, sinks : sinks + size], learnt.rotation, precision="highest")
    back = jnp.matmul(_rounded(turned, learnt.ranges, rule), learnt.rotation.T, precision="highest")[0]
    padded = jnp.pad(back, [(0, 0), (sinks, x.shape[1] - sinks - size), (0, 0)])
    return jnp.where(((slots >= sinks) & (slots < sinks + packed))[:, None], padded, x)


def _rounded(x: Float[Array, "1 K S H"], ranges: Ranges, rule: Packing) -> Float[Array, "1 K S H"]:
    """Quantises `x` and reads it back. Gradients are those of the values before rounding."""
    groups = packing.grouped(x, rule)
    low, step = clipped(groups, ranges, rule)
    exact = packing.dequantize(packing.encode(*lax.stop_gradient((x, low, step)), rule))
    low, step = jnp.expand_dims(low, rule.reduced), jnp.expand_dims(step, rule.reduced)
    codes = jnp.clip((groups - low) / jnp.where(step > 0, step, 1.0), 0, (1 << rule.bits) - 1)
    codes += lax.stop_gradient(jnp.round(codes) - codes)
    smooth = (codes * step + low).reshape(x.shape)
    return smooth + lax.stop_gradient(exact - smooth)
