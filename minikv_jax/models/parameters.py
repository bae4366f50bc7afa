"""Checkpoint tensors into the parameters of the Flax model.

Every format has a table of rules that maps its tensor names to parameters (`huggingface.RULES`, `gguf.RULES`). The
parameters' shapes come from `nnx.eval_shape`, so nothing is allocated before names and shapes are known to fit. The
parameters then go to the device one by one, in the model's dtype: beside the memory-mapped checkpoint the host holds
one parameter at a time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from minikv_jax import checks
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import JOINED, Llama, joined_widths

_BLOCK_ELEMENTS = 1 << 22  # values converted at a time: 16 MB of float32


@dataclasses.dataclass(frozen=True)
class Rule:
    """Maps the tensors whose names match `pattern` in full to the parameter at `path`.

    Attributes:
      pattern: a regular expression.
      path: the parameter, with the groups of the match filled in. It may name a part of a joined projection
        (`decoder.JOINED`) as if it were a parameter. All formats store matrices `[out, in]`: a path that ends in
        "kernel" is transposed. None: the tensor is not needed.
      heads: the config field with the number of heads whose channels are interleaved (`Family.gguf_interleaved`).
    """

    pattern: str
    path: str | None
    heads: str | None = None


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The named tensors of a checkpoint.

    Attributes:
      origin: the file or directory, for errors.
      shapes: of every tensor.
      read_rows: `read_rows(name, start, stop)` slices the first axis.
      rules: the first one that matches a name is used.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    read_rows: Callable[[str, int, int], np.ndarray]
    rules: tuple[Rule, ...]


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model's structure, and its parameters by dotted path as shapes only."""

    graph: Any
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, config: ModelConfig, dtype: DTypeLike) -> Skeleton:
        """The skeleton of a model, made without allocating it."""
        key: Any = _OneKey(jax.random.key(0))
        model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=key))
        graph, state = nnx.split(model)
        return cls(graph, {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)})

    def fill(self, arrays: Mapping[str, jax.Array]) -> Llama:
        """The model with `arrays` in the places of the shapes."""
        flat: dict[Any, Any] = {_path(name): leaf.replace(arrays[name]) for name, leaf in self.parameters.items()}
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


class _OneKey:
    """In place of `nnx.Rngs`, whose counter makes tracing take time that is quadratic in the number of layers."""

    def __init__(self, key: jax.Array):
        self._key = key

    def params(self) -> jax.Array:
        return self._key


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def read_parameters(
    config: ModelConfig, source: TensorSource, dtype: np.dtype, *, allow_nonfinite: bool = False
) -> Llama:
    """Makes a model of `config` with the tensors of `source`.

    Raises:
      ValueError: tensors are missing, unknown, of the wrong shape, or not finite in `dtype` unless that is allowed, all
        of them in one message; or the file repeats a tied embedding with other values.
    """
    check_depth(source.origin, config, [_match(name, source.rules)[1] or "" for name in source.shapes])
    skeleton = Skeleton.of(config, dtype)
    parts = {path: _parts(config, path, leaf.shape) for path, leaf in skeleton.parameters.items()}
    plan, repeats = _plan(config, source, {name: shape for part in parts.values() for name, shape in part.items()})
    arrays: dict[str, jax.Array] = {}
    nonfinite: list[str] = []
    for path, part in parts.items():
        hosts = [
            _to_parameter(_read(source, plan[name][0], dtype, nonfinite), plan[name][1], name, config) for name in part
        ]
        host = hosts[0] if len(hosts) == 1 else np.concatenate(hosts, axis=-1)
        arrays[path] = jnp.array(host).block_until_ready()  # a copy, done before the host buffer is dropped
    if not allow_nonfinite:
        raise_nonfinite(source.origin, nonfinite)
    for name in repeats:
        if not jnp.array_equal(_read(source, name, dtype, []), arrays["embed_tokens.embedding"], equal_nan=True):
            raise ValueError(f"{source.origin}: tie_word_embeddings is true, but {name} differs from the embedding")
    return skeleton.fill(arrays)


def _parts(config: ModelConfig, path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what fills a parameter: the parameter itself, or in order the blocks of columns it joins."""
    *parents, module, kind = path.split(".")
    if module not in JOINED:
        return {path: shape}
    widths = joined_widths(config, module)
    return {".".join((*parents, name, kind)): (*shape[:-1], width) for name, width in widths.items()}


def _plan(
    config: ModelConfig, source: TensorSource, needed: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[str, Rule]], list[str]]:
    """Which tensor fills each needed part, and the tensors that only repeat a tied embedding."""
    plan: dict[str, tuple[str, Rule]] = {}
    repeats: list[str] = []
    unknown, misshapen = [], []
    for name, shape in source.shapes.items():
        rule, path = _match(name, source.rules)
        if rule is not None and path is None:
            continue
        if path == "lm_head.kernel" and config.tie_word_embeddings:
            repeats.append(name)
            if shape != needed["embed_tokens.embedding"]:
                misshapen.append(f"{name} is {list(shape)}, the embedding {list(needed['embed_tokens.embedding'])}")
        elif rule is None or path is None or path not in needed:
            unknown.append(name)
        else:
            plan[path] = name, rule
            expected = needed[path][::-1] if path.endswith("kernel") else needed[path]
            if shape != expected:
                misshapen.append(f"{name} is {list(shape)}, the config needs {list(expected)}")
    unfilled = [path for path in needed if path not in plan]
    raise_misfits(source.origin, unknown=unknown, unfilled=unfilled, misshapen=misshapen)
    return plan, repeats


def _match(name: str, rules: Iterable[Rule]) -> tuple[Rule | None, str | None]:
    """The first rule for a tensor name, and the parameter it stands for."""
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            return rule, None if rule.path is None else match.expand(rule.path)
    return None, None


def raise_misfits(origin: str, *, unknown: list[str], unfilled: list[str], misshapen: list[str]) -> None:
    """Raises one ValueError that lists everything that keeps a checkpoint from being the model of its config."""
    parts = (("unknown tensors", unknown), ("parameters without a tensor", unfilled), ("wrong shapes", misshapen))
    if misfits := [f"{title}: {checks.listed(items)}" for title, items in parts if items]:
        raise ValueError(f"{origin} does not fit its config. {'; '.join(misfits)}")


def check_depth(origin: str, config: ModelConfig, paths: Iterable[str]) -> None:
    """Compares the number of layers with that of the parameters at `paths`, before a model of that depth is built.

    Raises:
      ValueError: the config has more layers.
    """
    layers = {match[1] for path in paths if (match := re.match(r"layers\.(\d+)\.", path))}
    if config.num_hidden_layers > len(layers):
        raise ValueError(
            f"{origin} does not fit its config: num_hidden_layers={config.num_hidden_layers}, but there are tensors of "
            f"{len(layers)} layers"
        )


def raise_nonfinite(origin: str, names: list[str]) -> None:
    """Raises ValueError naming tensors that hold NaN or infinite values."""
    if names:
        raise ValueError(
            f"{origin} has NaN or infinite values in {checks.listed(names)}: "
            "load(..., allow_nonfinite=True) or --allow-nonfinite goes on nevertheless"
        )


def _read(source: TensorSource, name: str, dtype: np.dtype, nonfinite: list[str]) -> np.ndarray:
    """A tensor in `dtype`, converted block by block so that only one copy of it exists.

    Its name is added to `nonfinite` if it holds NaN or infinite values, be it from the conversion.
    """
    shape = source.shapes[name]
    out = np.empty(shape, dtype)
    finite = True
    step = max(1, _BLOCK_ELEMENTS // max(1, out[:1].size))
    for start in range(0, shape[0], step):
        block = out[start : start + step]
        with np.errstate(over="ignore", invalid="ignore"):
            block[...] = source.read_rows(name, start, min(start + step, shape[0]))
        finite = finite and _is_finite(block)
    if not finite:
        nonfinite.append(name)
    return out


def _is_finite(array: np.ndarray) -> bool:
    """Whether a contiguous array of floats holds no NaN and no infinity.

    An infinity's bits, as an integer, are above those of every finite number of its sign, and a NaN's above them. The
    largest integers take a fraction of the time of `isfinite`, and of NumPy's float arithmetic in 16 bits.
    """
    infinity = np.array(np.inf, array.dtype)
    return all(
        array.view(kind).max(initial=0) < sign.view(kind)
        for kind, sign in ((f"i{array.itemsize}", infinity), (f"u{array.itemsize}", -infinity))
    )


def _to_parameter(array: np.ndarray, rule: Rule, path: str, config: ModelConfig) -> np.ndarray:
    """The tensor in the layout of its parameter."""
    if rule.heads is not None:
        # Channel i of a head's first half lies next to channel i of its second half.
        heads = getattr(config, rule.heads)
        pairs = array.reshape(heads, config.head_dim // 2, 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    return array.T if path.endswith("kernel") else array
