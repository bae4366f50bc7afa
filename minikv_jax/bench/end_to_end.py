"""One measured generation: a model's shape, a method and sizes in; seconds, bytes and the hardware's floor out.

The two programs are those of `generate.stream`, compiled ahead of time, so that prefill and decode are timed apart and
what they allocate is known before they run.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from minikv_jax.cache import memory
from minikv_jax.cache.state import KVCache
from minikv_jax.generate import _decode_chunk, _prefill_only, _settings, _State, bucket_length
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.base import load_plugin
from minikv_jax.methods.config import CacheConfig
from minikv_jax.models import hub
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.huggingface import config_from_hf
from minikv_jax.sampling import Sampling

SHAPES = pathlib.Path(__file__).parent / "shapes"
_RUNS = 3
_ENOUGH = 1.0  # seconds of measurement after which nothing is repeated
_LONG = 5.0  # seconds of a prefill's first run from which on it is the only one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Attributes:
      shape: a name in `shapes/`, a Hugging Face config.json or its directory: random weights. None with `model`.
      model: what `minikv_jax.load` takes: real weights.
      method: a preset's name, perhaps with changes (`presets.parse`), or one of Hugging Face's (`huggingface.METHODS`).
      batch, prompt_len, max_new_tokens: rows, prompt tokens of each, generated tokens of each.
      steps: decode steps to time, in the middle of the generation and at its end; None: all of it.
      plugins: Python files with methods.
    """

    shape: str | None = None
    model: str | None = None
    method: str
    batch: int
    prompt_len: int
    max_new_tokens: int
    steps: int | None = None
    dtype: str = "bfloat16"
    implementation: str | None = None
    plugins: tuple[str, ...] = ()

    def config(self) -> ModelConfig:
        """The model's shape. Of random weights the positions are raised to what the run needs.

        Raises:
          ValueError: an unknown shape, a malformed config, or too many tokens for a real model's positions.
        """
        needed = bucket_length(self.prompt_len) + self.max_new_tokens
        if self.shape is not None:
            config = shape_config(self.shape)
            return dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, needed))
        config = hub.load_config(self.model or "")
        if self.prompt_len + self.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{self.prompt_len} prompt tokens + {self.max_new_tokens} new ones exceed the model's "
                f"{config.max_position_embeddings} positions"
            )
        return config

    def stretches(self) -> dict[str, tuple[int, int]]:
        """First step and number of steps of what is timed."""
        new, steps = self.max_new_tokens, self.steps
        if steps is None or steps >= new:
            return {"all": (0, new)}
        return {"middle": ((new - steps) // 2, steps), "end": (new - steps, steps)}

    def preset(self) -> CacheConfig:
        """The method, the plugins loaded.

        Raises:
          ValueError: an unknown one, or one that evicts during generation.
        """
        for file in self.plugins:
            load_plugin(file)
        method = presets.parse(self.method)
        if method.evict_every is not None:
            raise ValueError(
                f"{self.method}: evict_every={method.evict_every} is not benched: lengths do not just grow"
            )
        return method

    def load(self) -> Llama:
        """The model, its weights on the device."""
        if self.model is None:
            return random_model(self.config(), self.dtype)
        return hub.load(self.model, dtype=self.dtype)[0]


def shape_config(shape: str) -> ModelConfig:
    """A named shape, or the one of a config.json or of its directory."""
    named = SHAPES / f"{shape}.json"
    if named.is_file():
        return config_from_hf(named)
    if not pathlib.Path(shape).exists():
        names = ", ".join(sorted(file.stem for file in SHAPES.glob("*.json")))
        raise ValueError(f"shape {shape!r}: expected one of {names}, a config.json or a directory that holds one")
    return config_from_hf(shape)


def skeleton(config: ModelConfig, dtype: str) -> Llama:
    """The model with shapes in place of its weights."""
    return nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))


def random_model(config: ModelConfig, dtype: str) -> Llama:
    """A model of random weights, made on the device one array after the other; norms scale by one."""
    graph, state = nnx.split(skeleton(config, dtype))
    draw = jax.jit(
        lambda key, shape, dtype: 0.02 * jax.random.normal(key, shape, dtype), static_argnames=("shape", "dtype")
    )
    leaves = nnx.to_flat_state(state)
    filled: dict[Any, Any] = {}
    # The largest first: what drawing needs besides then never decides the peak.
    for number, (path, leaf) in enumerate(sorted(leaves, key=lambda pair: -pair[1].size)):
        key = jax.random.fold_in(jax.random.key(0), number)
        ones = leaf.ndim == 1
        array = jnp.ones(leaf.shape, leaf.dtype) if ones else draw(key, shape=leaf.shape, dtype=leaf.dtype)
        filled[path] = leaf.replace(array.block_until_ready())
    return nnx.merge(graph, nnx.from_flat_state(filled))


class Programs:
    """The prefill and the decode program of a case, compiled from shapes alone; `config` stands in for the case's own.

    Attributes:
      prefill: `(params, ids, lengths, key) -> state`.
      decode: `(params, state, last) -> state`, up to step `last`; the state is donated.
      compile_s: seconds to trace and compile each of the two.
      needed_bytes: the larger of what the two hold at once, weights included.
    """

    def __init__(self, case: Case, config: ModelConfig | None = None):
        method, config = case.preset(), config or case.config()
        memory.check_model(config, method)
        self.graph, params = nnx.split(skeleton(config, case.dtype))
        tokens = bucket_length(case.prompt_len, config.max_position_embeddings)
        settings = _settings(
            skeleton(config, case.dtype), case.max_new_tokens, Sampling(), None, (), case.implementation, False
        )
        self.ids = jax.ShapeDtypeStruct((case.batch, tokens), jnp.int32)
        lengths = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
        arguments = (params, self.ids, lengths, jax.random.key(0))
        self.prefill, prefill_s = _compiled(_prefill_only, (self.graph, settings, method), arguments)
        state = jax.eval_shape(functools.partial(_prefill_only, self.graph, settings, method), *arguments)
        self.cache: KVCache = state.cache
        self.decode, decode_s = _compiled(_decode_chunk, (self.graph, settings), (params, state, jnp.int32(0)))
        self.compile_s = {"prefill": prefill_s, "decode": decode_s}
        self.needed_bytes = max(_held(self.prefill), _held(self.decode))


def _compiled(program: Any, static: tuple[Any, ...], arguments: tuple[Any, ...]) -> tuple[Any, float]:
    begin = time.perf_counter()
    compiled = program.lower(*static, *arguments).compile()
    return compiled, time.perf_counter() - begin


def _held(compiled: Any) -> int:
    """Bytes of arguments, results and temporaries; donated arguments count once."""
    found = compiled.memory_analysis()
    return (
        found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes - found.alias_size_in_bytes
    )


def measure(case: Case) -> dict[str, Any]:
    """Compiles, runs and times a case: a row of the report. Times are medians of up to three runs.

    All run warm, but for a prefill of over 5 s: that is timed once, and its first run counts.
    `decode` has an entry per stretch of steps: "all", or "middle" and "end" where `steps` says so. A stretch starts
    from the prompt's cache with its lengths moved on: the tokens between are not generated, their slots hold zeros.
    """
    programs = Programs(case)
    params = nnx.state(case.load())
    rows, tokens = programs.ids.shape
    ids = jax.random.randint(jax.random.key(1), (rows, tokens), 0, case.config().vocab_size, jnp.int32)
    lengths = jnp.full((rows,), case.prompt_len, jnp.int32)
    state, prompt, prefill_s, first_s = None, None, [], []
    while len(prefill_s) < 2 or (len(prefill_s) <= _RUNS and sum(prefill_s[1:]) < _ENOUGH):
        del state  # two caches would not fit where one fills the device
        begin = time.perf_counter()
        state = jax.block_until_ready(programs.prefill(params, ids, lengths, jax.random.key(0)))
        prefill_s.append(time.perf_counter() - begin)
        prompt = jax.tree.map(np.asarray, _Lengths.of(state.cache))
        begin = time.perf_counter()
        state = jax.block_until_ready(programs.decode(params, state, jnp.int32(1)))
        first_s.append(prefill_s[-1] + time.perf_counter() - begin)
        if prefill_s[0] > _LONG:
            break
    assert state is not None and prompt is not None
    decode = {}
    for name, (first, steps) in case.stretches().items():
        times: list[float] = []
        while len(times) < _RUNS and sum(times) < _ENOUGH:
            state = jax.block_until_ready(_moved(state, prompt, first))
            begin = time.perf_counter()
            state = jax.block_until_ready(programs.decode(params, state, jnp.int32(first + steps)))
            times.append(time.perf_counter() - begin)
        decode[name] = {
            "first_step": first,
            "steps": steps,
            "ms_per_step": 1e3 * statistics.median(times) / steps,
            "cache_bytes_read": bytes_read(state.cache, prompt, range(first + 1, first + steps + 1)),
        }
    ms = next(iter(decode.values()))["ms_per_step"]
    return {
        "compile_s": programs.compile_s,
        "prefill_s": statistics.median(prefill_s[1:] or prefill_s),
        "time_to_first_token_s": statistics.median(first_s[1:] or first_s),
        "decode": decode,
        "decode_ms": ms,
        "decode_tokens_per_s": 1e3 * rows / ms,
        "weight_bytes": memory.weight_bytes(case.config(), case.dtype),
        "cache_bytes": state.cache.nbytes,
        "predicted_bytes": programs.needed_bytes,
        "peak_bytes": peak_bytes(),
    }


class _Lengths(NamedTuple):
    """Every layer's packed and tail length, and the tokens seen."""

    packed: list[Any]
    tail: list[Any]
    seen: Any

    @classmethod
    def of(cls, cache: KVCache) -> _Lengths:
        layers = cache.layers
        return cls([layer.packed_length for layer in layers], [layer.tail_length for layer in layers], cache.length)

    def after(self, steps: int, cache: KVCache) -> _Lengths:
        """What these host arrays become by that many steps: a full tail packs its oldest block."""
        packed, tail = [], []
        for layer, packed_length, tail_length in zip(cache.layers, self.packed, self.tail, strict=True):
            block = layer.config.flush_block
            over = np.maximum(tail_length + steps - (layer.tail_capacity - block), 0)
            flushed = over // block * block if layer.packed_capacity >= block else 0 * over
            packed.append(packed_length + flushed)
            tail.append(tail_length + steps - flushed)
        return _Lengths(packed, tail, self.seen + steps)


def _moved(state: _State, prompt: _Lengths, step: int) -> _State:
    """The state with its lengths as after `step` steps on the prompt's."""
    lengths = jax.tree.map(jnp.asarray, prompt.after(step, state.cache))
    layers = (
        dataclasses.replace(layer, packed_length=packed, tail_length=tail)
        for layer, packed, tail in zip(state.cache.layers, lengths.packed, lengths.tail, strict=True)
    )
    cache = KVCache(tuple(layers), lengths.seen)
    return state._replace(step=jnp.int32(step), lengths=jnp.full_like(state.lengths, step), cache=cache)


def bytes_read(cache: KVCache, prompt: _Lengths, steps: range) -> int:
    """Bytes of the valid tokens, the mean over the lengths after `steps`: what a decode step has to read."""
    total = 0.0
    for lengths in (prompt.after(step, cache) for step in steps):
        for layer, packed, tail in zip(cache.layers, lengths.packed, lengths.tail, strict=True):
            if layer.packed_capacity:
                total += layer.packed_bytes * packed.mean() / layer.packed_capacity
            total += (layer.tail_k.nbytes + layer.tail_v.nbytes) * tail.mean() / layer.tail_capacity
    return round(total / len(steps))


def peak_bytes() -> int | None:
    """The most that this process has held on the device; None where the device keeps no count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
