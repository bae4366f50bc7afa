"""Measures one generation: the seconds, the bytes and the hardware's floor for a model, a method and sizes.

The two programs are those of `generate.stream`, compiled ahead of time (`generate.compile_ahead`), so that prefill and
decode are timed apart and their memory is known before they run.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from minikv_jax import meshes
from minikv_jax.bench.random_models import first_layers, random_model, shape_config, skeleton
from minikv_jax.cache import memory
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.state import LayerCache
from minikv_jax.generate import compile_ahead
from minikv_jax.meshes import AXES, DATA, MODEL
from minikv_jax.methods import contracts, lookup
from minikv_jax.methods.method import Method
from minikv_jax.methods.plugins import load_plugin
from minikv_jax.models import hub
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.programs import State
from minikv_jax.prompts import bucket_length

_MAX_RUNS = 3
_MIN_TIMED_SECONDS = 1.0  # no run is repeated after this many seconds of measurement
_SLOW_PREFILL_SECONDS = 5.0  # a prefill whose first run takes longer is not repeated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    Attributes:
      shape: for random weights, a name in `shapes/`, a Hugging Face config.json or its directory. None with `model`.
      model: for real weights, a source that `minikv_jax.load` takes.
      method: a method's name, perhaps with changes (`lookup.parse`), or one of Hugging Face's (`huggingface.METHODS`).
      batch, prompt_len, max_new_tokens: rows, prompt tokens per row, generated tokens per row.
      steps: decode steps to time, in the middle of the generation and at its end. None times all of them.
      plugins: Python files with methods.
      mesh: sizes of a mesh's axes (`meshes.parse`); None for one device.
      layers: cuts a model with random weights to its first layers; None keeps all.
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
    mesh: str | None = None
    layers: int | None = None

    def config(self) -> ModelConfig:
        """The model's config. With random weights, its positions are raised to what the run needs.

        Raises:
          ValueError: an unknown shape, a malformed config, more layers than it has, layers of a real model, or too
            many tokens for its positions.
        """
        needed = bucket_length(self.prompt_len) + self.max_new_tokens
        if self.shape is not None:
            config = shape_config(self.shape)
            config = config if self.layers is None else first_layers(config, self.layers)
            return dataclasses.replace(config, max_position_embeddings=max(config.max_position_embeddings, needed))
        if self.layers is not None:
            raise ValueError(f"layers={self.layers}: a model with real weights runs as a whole")
        config = hub.load_config(self.model or "")
        if self.prompt_len + self.max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"{self.prompt_len} prompt tokens + {self.max_new_tokens} new ones exceed the model's "
                f"{config.max_position_embeddings} positions"
            )
        return config

    def stretches(self) -> dict[str, tuple[int, int]]:
        """First step and number of steps of every stretch that is timed."""
        new, steps = self.max_new_tokens, self.steps
        if steps is None or steps >= new:
            return {"all": (0, new)}
        return {"middle": ((new - steps) // 2, steps), "end": (new - steps, steps)}

    def resolve_method(self) -> Method:
        """Loads the plugins and returns the method.

        Raises:
          ValueError: an unknown method, or one that evicts during generation.
        """
        for file in self.plugins:
            load_plugin(file)
        method = lookup.parse(self.method)
        if method.evict_every is not None:
            raise ValueError(
                f"{self.method}: evict_every={method.evict_every} cannot be measured, because lengths do not only grow"
            )
        return method

    def check(self) -> None:
        """Raises ValueError for a model or method that cannot be measured, or a method that does not fit the model."""
        contracts.check(self.resolve_method(), self.config())

    def devices(self) -> Mesh | None:
        """The mesh of the run. Raises ValueError if this machine has too few devices."""
        return None if self.mesh is None else meshes.make_mesh(meshes.parse(self.mesh))

    def shards(self, *axes: str) -> int:
        """Parts that the axes of the mesh cut an array into."""
        sizes = {} if self.mesh is None else meshes.parse(self.mesh)
        return math.prod(sizes.get(axis, 1) for axis in axes)

    def load(self) -> Llama:
        """Loads the model onto the device, or onto the mesh."""
        if self.model is None:
            return random_model(self.config(), self.dtype, self.devices())
        return hub.load(self.model, dtype=self.dtype, mesh=self.devices())[0]


class Programs:
    """The prefill and the decode program of a case (`generate.Programs`), compiled from shapes without weights.

    Attributes:
      prefill: `(params, None, ids, lengths, key) -> state`.
      decode: `(params, state, last) -> state`, up to step `last`; the state is donated.
      tokens: length that the prompts are padded to.
      cache: shapes of the cache.
      compile_s: seconds to trace and compile each of the two.
      needed_bytes: peak of the two programs' bytes, weights included.
    """

    def __init__(self, case: Case, config: ModelConfig | None = None):
        """Compiles the programs, perhaps with another `config` than the case's own."""
        method, config = case.resolve_method(), config or case.config()
        programs = compile_ahead(
            skeleton(config, case.dtype, case.devices()),
            case.batch,
            case.prompt_len,
            method=method,
            max_new_tokens=case.max_new_tokens,
            eos_token_ids=(),
            implementation=case.implementation,
        )
        self.prefill, self.decode = programs.prefill, programs.decode
        self.tokens = bucket_length(case.prompt_len, config.max_position_embeddings)
        self.cache: KVCache = programs.state.cache
        self.compile_s = programs.compile_s
        self.needed_bytes = max(_allocated_bytes(self.prefill), _allocated_bytes(self.decode))


def _allocated_bytes(compiled: Any) -> int:
    """Bytes of arguments, results and temporaries; donated arguments count once."""
    sizes = compiled.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return held - sizes.alias_size_in_bytes


class CacheLengths(NamedTuple):
    """Packed and tail length of every part of the cache, and the tokens seen."""

    packed: list[Any]
    tail: list[Any]
    seen: Any

    @classmethod
    def of(cls, cache: KVCache) -> CacheLengths:
        """Copies the lengths to the host."""
        parts = cache.parts
        lengths = cls([part.packed.length for part in parts], [part.tail.length for part in parts], cache.length)
        return jax.tree.map(np.asarray, lengths)

    def after(self, steps: int, cache: KVCache) -> CacheLengths:
        """Lengths after `steps` more steps; a full tail packs its oldest block."""
        packed, tail = [], []
        for part, packed_length, tail_length in zip(cache.parts, self.packed, self.tail, strict=True):
            block = part.method.flush_block
            over = np.maximum(tail_length + steps - (part.tail.capacity - block), 0)
            flushed = over // block * block if part.packed.capacity >= block else 0 * over
            packed.append(packed_length + flushed)
            tail.append(tail_length + steps - flushed)
        return CacheLengths(packed, tail, self.seen + steps)


def measure(case: Case, params: Any = None) -> dict[str, Any]:
    """Compiles, runs and times a case, and returns a row of the report. Times are medians of up to three runs.

    `params` are the model's parameters, if they are loaded already.

    All runs are warm, except a prefill of over 5 s, which is timed only once, on its first run. `decode` has an entry
    per stretch of steps: "all", or "middle" and "end" if the case has `steps`. A stretch starts from the prompt's cache
    with its lengths moved on: the tokens between are not generated, and their slots hold zeros.
    """
    programs = Programs(case)
    params = nnx.state(case.load()) if params is None else params
    weights = memory.weight_bytes(case.config(), case.dtype)
    prefill = time_prefill(programs, params, case)
    decode, state = {}, prefill.state
    for name, (first, steps) in case.stretches().items():
        state, seconds = time_stretch(programs, params, state, prefill.lengths, first, steps)
        cache_bytes = bytes_read(state.cache, prefill.lengths, range(first + 1, first + steps + 1))
        decode[name] = {
            "first_step": first,
            "steps": steps,
            "ms_per_step": 1e3 * seconds / steps,
            "cache_bytes_read": cache_bytes,
            "device_bytes_read": round(weights / case.shards(MODEL) + cache_bytes / case.shards(*AXES)),
        }
    ms = next(iter(decode.values()))["ms_per_step"]
    return {
        "compile_s": programs.compile_s,
        "prefill_s": prefill.seconds,
        "time_to_first_token_s": prefill.first_token_seconds,
        "decode": decode,
        "decode_ms": ms,
        "decode_tokens_per_s": 1e3 * case.batch / ms,
        "weight_bytes": weights,
        "cache_bytes": state.cache.nbytes,
        "predicted_bytes": programs.needed_bytes,
        "peak_bytes": peak_bytes(),
    }


class _Prefill(NamedTuple):
    """A timed prefill: median seconds, and the state after the first token with the prompt's lengths."""

    seconds: float
    first_token_seconds: float
    state: State
    lengths: CacheLengths


def prompts(programs: Programs, case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random prompts, their lengths and a PRNG key, as the prefill takes them."""
    ids = jax.random.randint(jax.random.key(1), (case.batch, programs.tokens), 0, case.config().vocab_size, jnp.int32)
    lengths, key = jnp.full((case.batch,), case.prompt_len, jnp.int32), jax.random.key(0)
    if (mesh := case.devices()) is not None:
        (ids, lengths), key = meshes.place((ids, lengths), mesh, DATA), meshes.place(key, mesh)
    return ids, lengths, key


def time_prefill(programs: Programs, params: Any, case: Case) -> _Prefill:
    """Times the prefill, and the prefill with one decode step."""
    inputs = prompts(programs, case)
    state, prompt, prefill_s, first_s = None, None, [], []
    while len(prefill_s) < 2 or (len(prefill_s) <= _MAX_RUNS and sum(prefill_s[1:]) < _MIN_TIMED_SECONDS):
        del state  # two caches would not fit if one fills the device
        begin = time.perf_counter()
        state = jax.block_until_ready(programs.prefill(params, None, *inputs))
        prefill_s.append(time.perf_counter() - begin)
        prompt = CacheLengths.of(state.cache)
        begin = time.perf_counter()
        state = jax.block_until_ready(programs.decode(params, state, np.int32(1)))
        first_s.append(prefill_s[-1] + time.perf_counter() - begin)
        if prefill_s[0] > _SLOW_PREFILL_SECONDS:
            break
    assert state is not None and prompt is not None
    return _Prefill(
        seconds=statistics.median(prefill_s[1:] or prefill_s),
        first_token_seconds=statistics.median(first_s[1:] or first_s),
        state=state,
        lengths=prompt,
    )


def time_stretch(
    programs: Programs, params: Any, state: State, prompt: CacheLengths, first: int, steps: int
) -> tuple[State, float]:
    """Runs a stretch of decode steps; returns the state after it and the median seconds."""
    times: list[float] = []
    while len(times) < _MAX_RUNS and sum(times) < _MIN_TIMED_SECONDS:
        state = jax.block_until_ready(at_step(state, prompt, first))
        begin = time.perf_counter()
        state = jax.block_until_ready(programs.decode(params, state, np.int32(first + steps)))
        times.append(time.perf_counter() - begin)
    return state, statistics.median(times)


def at_step(state: State, prompt: CacheLengths, step: int) -> State:
    """Returns the state with the lengths that it has `step` steps after the prompt."""
    lengths = prompt.after(step, state.cache)
    numbers = iter(zip(lengths.packed, lengths.tail, strict=True))

    def moved(part: LayerCache) -> LayerCache:
        packed, tail = next(numbers)
        return dataclasses.replace(
            part,
            packed=dataclasses.replace(part.packed, length=_in_place_of(part.packed.length, packed)),
            tail=dataclasses.replace(part.tail, length=_in_place_of(part.tail.length, tail)),
        )

    layers = jax.tree.map(moved, state.cache.layers, is_leaf=lambda x: isinstance(x, LayerCache))
    cache = KVCache(layers, _in_place_of(state.cache.length, lengths.seen))
    return state._replace(
        step=_in_place_of(state.step, np.int32(step)),
        lengths=_in_place_of(state.lengths, np.full(state.lengths.shape, step, np.int32)),
        cache=cache,
    )


def _in_place_of(array: jax.Array, values: np.ndarray | np.generic) -> jax.Array:
    """Other values on the same devices."""
    return jax.device_put(np.asarray(values, array.dtype), array.sharding)


def bytes_read(cache: KVCache, prompt: CacheLengths, steps: range) -> int:
    """Bytes of the valid tokens, which a decode step has to read; the mean over `steps`."""
    total = 0.0
    for lengths in (prompt.after(step, cache) for step in steps):
        for part, packed, tail in zip(cache.parts, lengths.packed, lengths.tail, strict=True):
            if part.packed.capacity:
                total += part.packed.nbytes * packed.mean() / part.packed.capacity
            total += part.tail.nbytes * tail.mean() / part.tail.capacity
    return round(total / len(steps))


def peak_bytes() -> int | None:
    """Peak bytes of this process on the device; None if the device keeps no count."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
