"""Tests wrong arguments, generated from the legends of all public functions of arrays.

Each must raise one error of the library, in one line, before anything runs, both eagerly and under tracing.
"""

import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.layers import cache_of
from support.tiny import tiny_model

import minikv_jax as mk
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.methods.kivi import MinMax
from minikv_jax.methods.method import Method, Tail
from minikv_jax.ops.decode_attention import decode_attention_weights

B, T, N, K, H, V = 2, 5, 4, 2, 16, 96
FULL, QUANTIZED = Method(), Method(quantizer=MinMax(), tail=Tail(length=16))


@dataclasses.dataclass(frozen=True)
class Entry:
    """A function of arrays with valid arguments and their contracts.

    Attributes:
      call: of `arguments` by name.
      legends: axes of the arrays; a lower-case letter is an axis of any size.
      least, most: bounds of the integer arrays.
      numbers: wrong values for the arguments that are not arrays.
      optional: arrays that may be None.
    """

    call: Callable[..., Any]
    arguments: dict[str, Any]
    legends: dict[str, str]
    least: dict[str, int] = dataclasses.field(default_factory=dict)
    most: dict[str, int] = dataclasses.field(default_factory=dict)
    numbers: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def integers(*values: Any) -> np.ndarray:
    return np.array(values, np.int32)


@functools.cache
def model() -> mk.Llama:
    return tiny_model(max_position_embeddings=64)


@functools.cache
def layer(method: Method = FULL) -> mk.LayerCache:
    k = floats(B, 9, K, H)
    return cache_of(method, k, k, np.array([9, 2]), 40)


@functools.cache
def cache() -> KVCache:
    return jax.jit(functools.partial(mk.prefill, method="full", max_new_tokens=9))(
        model(), jnp.zeros((B, T), jnp.int32), jnp.array([T, 2])
    )[1]


def prefill_one_layer(q: Any, k: Any, v: Any, lengths: Any, frequencies: Any = None, **more: Any) -> Any:
    own = {name: more.pop(name) for name in ("layer", "window", "output_projection") if name in more}
    return mk.prefill_layer(mk.LayerInputs(q, k, v, lengths, frequencies=frequencies, **own), "full", 4, **more)


IDS = np.zeros((B, T), np.int32)
Q, KV, LENGTHS = floats(B, T, N, H), floats(B, T, K, H), integers(T, 2)
PROMPT = {"q": Q, "k": KV, "v": KV, "lengths": LENGTHS}
PROMPT_LEGENDS = {"q": "B T N H", "k": "B T K H", "v": "B T K H", "lengths": "B"}
WRONG_SCALES = [0, -1.0, float("nan"), float("inf"), "1", True, [1.0], 10**400]
WRONG_COUNTS = [-1, 1.5, "2", True, float("nan"), None, [1], 10**12]
WRONG_POSITIVES = [0, -1, 1.5, "2", True, float("nan"), [1]]
IMPLEMENTATIONS = ["triton", "", "XLA", 1, ["xla"]]
APPEND = {"k": KV, "v": KV, "lengths": LENGTHS, "positions": np.zeros((B, T), np.int32)}
NO_MODELS = [None, "smollm2", {}, 3]
NO_LAYERS = [None, "full", {}, floats(B, K, T, H)]

GENERATION = {
    "model": model(),
    "prompts": [[1, 2, 3], [4]],
    "method": "full",
    "max_new_tokens": 2,
    "sampling": mk.Sampling(temperature=1.0),
}
WRONG_GENERATION = {
    "model": NO_MODELS,
    "prompts": [
        *(None, "abc", 3, [], {}, [[]], [1, 2], [[[1]]], ["ab"], [[1.0]], [[True]], [[None]], [[-1]], [[V]], [[2**63]]),
        *(iter([[1]]), jnp.int32(3), np.zeros((1, 2, 3), int), np.zeros((2, 0), int), [[1, [2]]], [[0] * 65]),
    ],
    "method": ["nosuch", 3, MinMax(), Method, layer()],
    "cache": [3, "cache", layer(), cache()],  # the last with a method too
    "max_new_tokens": [*WRONG_POSITIVES, 65, 10**30],
    "sampling": [None, 1.0, "greedy", {}, mk.Sampling],
    "key": [None, 3, "key", jax.random.split(jax.random.key(0)), floats(2), np.zeros((3, 3), np.uint32), jnp.int32(3)],
    "eos_token_ids": [3, "ab", [1.0], [[1]], [[1], [2, 3]], [-1], [V], [True], [None], [2**63]],
    "implementation": IMPLEMENTATIONS,
    "log_probabilities": ["yes", 1, None],
}

ENTRIES = {
    "append": Entry(
        mk.append,
        APPEND | {"layer": layer()},
        {"k": "B T K H", "v": "B T K H", "lengths": "B", "positions": "B T"},
        {"lengths": 0, "positions": 0},
        {"lengths": T, "positions": 2**31 - 1},
        {"layer": NO_LAYERS},
    ),
    "append to packed": Entry(
        mk.append,
        APPEND | {"layer": layer(QUANTIZED)},
        {"k": "B T K H", "v": "B T K H", "lengths": "B", "positions": "B T"},
        {"lengths": 0},
        {"lengths": T},
        {"implementation": IMPLEMENTATIONS},
    ),
    "decode_attention": Entry(
        mk.decode_attention,
        {"q": Q[:, 0], "layer": layer(QUANTIZED), "positions": LENGTHS},
        {"q": "B N H", "positions": "B"},
        {"positions": 0},
        {"positions": 2**31 - 1},
        {"scale": WRONG_SCALES, "implementation": IMPLEMENTATIONS, "layer": NO_LAYERS},
        optional=("positions",),
    ),
    "decode_attention_weights": Entry(
        decode_attention_weights,
        {"q": Q[:, 0], "layer": layer()},
        {"q": "B N H"},
        numbers={"scale": WRONG_SCALES, "layer": [*NO_LAYERS, layer(QUANTIZED)]},
    ),
    "extend_attention": Entry(
        mk.extend_attention,
        PROMPT | {"layer": layer(), "positions": np.zeros((B, T), np.int32)},
        PROMPT_LEGENDS | {"positions": "B T"},
        {"lengths": 0, "positions": 0},
        {"lengths": T, "positions": 2**31 - 1},
        {"scale": WRONG_SCALES, "implementation": IMPLEMENTATIONS, "layer": NO_LAYERS},
        optional=("positions",),
    ),
    "prefill_attention": Entry(
        mk.prefill_attention,
        PROMPT,
        PROMPT_LEGENDS,
        {"lengths": 0},
        {"lengths": T},
        {
            "scale": WRONG_SCALES,
            "window": WRONG_POSITIVES,
            "with_scores": ["yes", 1, None],
            "implementation": IMPLEMENTATIONS,
        },
    ),
    "prefill_layer": Entry(
        prefill_one_layer,
        PROMPT | {"frequencies": floats(H // 2), "output_projection": floats(N * H, 5)},
        PROMPT_LEGENDS | {"frequencies": "F", "output_projection": "R d"},
        {"lengths": 0},
        {"lengths": T},
        {"window": WRONG_POSITIVES, "num_layers": WRONG_POSITIVES, "layer": [1, -1, 1.5, "0", None, [0], floats(1)]},
        optional=("frequencies", "output_projection"),
    ),
    "quantize": Entry(
        mk.quantize,
        {"x": floats(B, K, 32, 32), "packing": mk.Packing(2, 16, "channels")},
        {"x": "b k S H"},
        numbers={"packing": [None, "minmax", 2, MinMax()], "implementation": IMPLEMENTATIONS},
    ),
    "select_rows": Entry(
        KVCache.select_rows, {"self": cache(), "rows": integers(1, 0, 1)}, {"rows": "r"}, {"rows": 0}, {"rows": B - 1}
    ),
    "tile": Entry(KVCache.tile, {"self": cache(), "times": 2}, {}, numbers={"times": [0, *WRONG_COUNTS]}),
    "grow": Entry(KVCache.grow, {"self": cache(), "tokens": 2}, {}, numbers={"tokens": WRONG_COUNTS}),
    "grow a layer": Entry(
        mk.LayerCache.grow, {"self": layer(QUANTIZED), "tokens": 2}, {}, numbers={"tokens": WRONG_COUNTS}
    ),
    "prefill": Entry(
        mk.prefill,
        {"model": model(), "ids": IDS, "lengths": LENGTHS, "method": "full", "max_new_tokens": 4},
        {"ids": "B t", "lengths": "B"},
        {"ids": 0, "lengths": 1},
        {"ids": V - 1, "lengths": T},
        {
            "model": NO_MODELS,
            "max_new_tokens": WRONG_COUNTS,
            "method": [None, "nosuch", 3, MinMax(), Method],
            "implementation": IMPLEMENTATIONS,
        },
    ),
    "decode": Entry(
        mk.decode,
        {"model": model(), "cache": cache(), "token": integers(1, 2), "active": integers(1, 0)},
        {"token": "B", "active": "B"},
        {"token": 0, "active": 0},
        {"token": V - 1, "active": 1},
        {"model": NO_MODELS, "cache": [*NO_LAYERS, layer()], "implementation": IMPLEMENTATIONS},
    ),
    "extend": Entry(
        mk.extend,
        {"model": model(), "cache": cache(), "ids": IDS, "lengths": LENGTHS},
        {"ids": "B t", "lengths": "B"},
        {"ids": 0, "lengths": 0},
        {"ids": V - 1, "lengths": T},
        {"model": NO_MODELS, "cache": [*NO_LAYERS, layer()], "implementation": IMPLEMENTATIONS},
    ),
    "one_shot": Entry(
        mk.one_shot,
        {"model": model(), "ids": IDS, "lengths": LENGTHS},
        {"ids": "B t", "lengths": "B"},
        {"ids": 0, "lengths": 0},
        {"ids": V - 1, "lengths": T},
        {"model": NO_MODELS},
        optional=("lengths",),
    ),
    "generate": Entry(mk.generate, GENERATION | {"key": jax.random.key(0)}, {}, numbers=WRONG_GENERATION),
    "stream": Entry(
        lambda **arguments: list(mk.stream(**arguments)),
        GENERATION | {"key": jax.random.PRNGKey(0)},
        {},
        numbers=WRONG_GENERATION | {"chunk": WRONG_POSITIVES},
    ),
    "compile_ahead": Entry(
        mk.compile_ahead,
        {name: value for name, value in GENERATION.items() if name != "prompts"} | {"batch": 2, "prompt_tokens": 3},
        {},
        numbers={
            "batch": [*WRONG_POSITIVES, 10**30],
            "prompt_tokens": [*WRONG_POSITIVES, 65, 10**30],
            "log_probabilities": ["yes", 1, None],
        },
    ),
    "memory.report": Entry(
        mk.memory.report,
        {"model": model().config, "method": "full", "prompt_length": 8, "max_new_tokens": 2, "dtype": "float32"},
        {},
        numbers={
            "model": [*NO_MODELS, model()],
            "method": ["nosuch", None, 3],
            "prompt_length": [*WRONG_POSITIVES, 10**30],
            "max_new_tokens": [*WRONG_POSITIVES, 10**30],
            "batch": [*WRONG_POSITIVES, 10**30],
            "dtype": ["float64", "int8", None, ["float32"], 32],
        },
    ),
    "dequantize": Entry(
        mk.dequantize,
        {"x": mk.quantize(jnp.ones((1, 1, 32, 16)), mk.Packing(2, 16, "tokens"))},
        {},
        numbers={"x": [None, floats(1, 1, 32, 16), "x"], "dtype": ["nosuch", "int8", "float64", None, [1]]},
    ),
}


def resized(x: np.ndarray, axis: int, size: int) -> np.ndarray:
    return np.resize(x, (*x.shape[:axis], size, *x.shape[axis + 1 :])) if size else x.take([], axis)


def other_shapes(x: np.ndarray, legend: str) -> Iterator[tuple[str, np.ndarray]]:
    yield "an axis more", x[None]
    yield "an axis too many behind", x[..., None]
    yield "an axis less", x[0]
    for axis, letter in enumerate(legend.split()):
        yield f"no {letter}", resized(x, axis, 0)
        if letter.isupper():
            yield f"{letter} + 1", resized(x, axis, x.shape[axis] + 1)
            yield f"{letter} - 1", resized(x, axis, x.shape[axis] - 1)
    for axis in range(x.ndim - 1):
        if x.shape[axis] != x.shape[axis + 1]:
            yield f"axes {axis} and {axis + 1} swapped", x.swapaxes(axis, axis + 1)


def other_dtypes(x: np.ndarray) -> Iterator[tuple[str, Any]]:
    is_integer = np.issubdtype(x.dtype, np.integer)
    for dtype in ("float32", "float16", "bool", "complex64") if is_integer else ("int32", "uint8", "bool", "complex64"):
        yield dtype, x.astype(dtype)


def no_arrays(x: np.ndarray, optional: bool) -> Iterator[tuple[str, Any]]:
    if not optional:
        yield "none", None
    yield "a list", x.tolist()
    yield "a number", 1
    yield "text", "x"
    yield "a shape", jax.ShapeDtypeStruct(x.shape, x.dtype)
    yield "objects", x.astype(object)
    yield "texts", x.astype(str)
    yield "keys", jax.random.split(jax.random.key(0), x.shape)


def out_of_range(x: np.ndarray, least: int | None, most: int | None) -> Iterator[tuple[str, np.ndarray]]:
    for bound, step in ((least, -1), (most, 1)):
        if bound is not None:
            for at in (0, -1):
                wrong = x.astype(np.int64)
                wrong.flat[at] = bound + step
                yield f"element {at} beyond {bound}", wrong
                wrong = wrong.copy()
                wrong.flat[at] = bound + step * 2**40
                yield f"element {at} far beyond {bound}", wrong


def one_error(call: Callable[[], Any]) -> str:
    """Describes what is wrong with the library's error; empty if it raises one error of its own."""
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        text, last = str(error), traceback.extract_tb(error.__traceback__)[-1]
        if type(error) not in (ValueError, NotImplementedError):
            return f"{type(error).__name__}: {text[:100]}"
        if "\n" in text or len(text) > 600:
            return f"not one line: {text[:200]!r}"
        return "" if "/minikv_jax/" in last.filename else f"raised in {last.filename}: {text[:100]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "accepted"


def traced(entry: Entry, arguments: dict[str, Any]) -> Callable[[], Any]:
    """Makes a call with traced arrays."""
    arrays = {name: arguments[name] for name in entry.legends if name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in arrays}
    return lambda: jax.eval_shape(lambda arrays: entry.call(**rest, **arrays), arrays)


def cases(entry: Entry) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Lists a name and a call for each wrong argument."""
    for name, legend in entry.legends.items():
        x = entry.arguments[name]
        for what, wrong in (*other_shapes(x, legend), *other_dtypes(x)):
            arguments = entry.arguments | {name: wrong}
            yield f"{name}: {what}", functools.partial(entry.call, **arguments)
            yield f"{name}: {what}, traced", traced(entry, arguments)
        for what, wrong in (
            *no_arrays(x, name in entry.optional),
            *out_of_range(x, entry.least.get(name), entry.most.get(name)),
        ):
            yield f"{name}: {what}", functools.partial(entry.call, **entry.arguments | {name: wrong})
    for name, values in entry.numbers.items():
        for value in values:
            yield f"{name}={value!r:.40}", functools.partial(entry.call, **entry.arguments | {name: value})


@pytest.mark.parametrize("name", [name for name in ENTRIES if name not in ("generate", "stream", "compile_ahead")])
def test_right_arguments_are_taken(name: str):
    """What the campaign changes is right before it is changed; generations run in many other tests."""
    entry = ENTRIES[name]
    jax.eval_shape(lambda: jax.tree.leaves(entry.call(**entry.arguments)) if entry.legends else ())  # values are known
    if not entry.legends:
        entry.call(**entry.arguments)


def test_wrong_arguments_are_one_error_each():
    failures, count = [], 0
    for name, entry in ENTRIES.items():
        for case, call in cases(entry):
            count += 1
            if problem := one_error(call):
                failures.append(f"{name}, {case}: {problem}")
    print(f"{count} wrong arguments of {len(ENTRIES)} functions")
    assert failures == []
    assert count >= 500
