"""Converts checkpoint tensors to the parameters of the Flax model.

A table of rules per format maps tensor names to parameters (`huggingface_tensors.rules`, `gguf.rules`). The parameters'
shapes come from `nnx.eval_shape`, so nothing is allocated until names and shapes are known to fit. Then each device's
part of each parameter is read in the model's dtype. The host holds one part at a time beside the memory-mapped
checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from minikv_jax import checks
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.partition import check_mesh, placement
from minikv_jax.models.projections import JOINED, joined
from minikv_jax.models.tensors import Bounds, Rule, TensorReader, TensorSource


@dataclasses.dataclass(frozen=True)
class Skeleton:
    """A model's structure and the shapes of its parameters by dotted path, without arrays."""

    graph: Any
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, config: ModelConfig, dtype: DTypeLike) -> Skeleton:
        """Makes the skeleton of a model without allocating the model."""
        model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=_OneKey()))
        graph, state = nnx.split(model)
        return cls(graph, {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)})

    def fill(self, arrays: Mapping[str, jax.Array], mesh: Mesh | None = None) -> Llama:
        """Makes the model from `arrays` by dotted path, which lie on `mesh`."""
        flat: dict[Any, Any] = {_path(name): leaf.replace(arrays[name]) for name, leaf in self.parameters.items()}
        model = nnx.merge(self.graph, nnx.from_flat_state(flat))
        model.mesh = mesh
        return model


class _OneKey(nnx.Rngs):
    """Gives one key for every draw: a counter in its place makes tracing quadratic in the number of layers."""

    def params(self) -> jax.Array:
        return jax.random.key(0)


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def read_parameters(
    config: ModelConfig,
    source: TensorSource,
    dtype: np.dtype,
    *,
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> Llama:
    """Makes a model from the tensors of a checkpoint.

    Args:
      config: the model's shape.
      source: the tensors.
      dtype: dtype of the parameters.
      mesh: devices to split the model over; None for JAX's default device.
      allow_nonfinite: accept tensors with NaN or infinite values.

    Raises:
      ValueError: tensors are missing, unknown, of the wrong shape or, unless allowed, not finite in `dtype` (one
        message lists them all); or the output projection differs from the embedding that it is tied to.
    """
    mesh = None if mesh is None else check_mesh(config, mesh)
    check_depth(source.origin, config, [_match(name, source.rules)[1] or "" for name in source.shapes])
    skeleton = Skeleton.of(config, dtype)
    parts = {path: _parts(config, path, leaf.shape) for path, leaf in skeleton.parameters.items()}
    plan, repeats = _plan(config, source, {name: shape for part in parts.values() for name, shape in part.items()})
    arrays: dict[str, jax.Array] = {}
    reader = TensorReader(source, config, dtype, set())
    for path, leaf in skeleton.parameters.items():
        tensors = {name: plan[name] for name in parts[path]}
        arrays[path] = _place(path, leaf.shape, reader, tensors, mesh)
    if not allow_nonfinite:
        raise_nonfinite(source.origin, reader.nonfinite)
    for name in repeats:
        if not jnp.array_equal(reader.whole(name), arrays["embed_tokens.embedding"], equal_nan=True):
            raise ValueError(f"{source.origin}: tie_word_embeddings is true, but {name} differs from the embedding")
    return skeleton.fill(arrays, mesh)


def _place(
    path: str, shape: tuple[int, ...], reader: TensorReader, tensors: Mapping[str, tuple[str, Rule]], mesh: Mesh | None
) -> jax.Array:
    """Reads a parameter onto its devices, the part of each device on its own."""
    parts: dict[Bounds, np.ndarray] = {}  # read once for all devices that hold the same part

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        bounds = tuple(at.indices(size)[:2] for at, size in zip(index, shape, strict=True))
        if bounds not in parts:
            parts[bounds] = _read_part(reader, tensors, bounds)
        return parts[bounds]

    return jax.make_array_from_callback(shape, placement(path, reader.config, mesh), part).block_until_ready()


def _read_part(reader: TensorReader, tensors: Mapping[str, tuple[str, Rule]], bounds: Bounds) -> np.ndarray:
    """Reads a block of a parameter: of its only tensor, of joined ones, or of the experts stacked in it."""
    owners = {number: dict(own) for number, own in itertools.groupby(tensors.items(), lambda item: _expert(item[0]))}
    if None in owners:
        return _read_joined(reader, tensors, bounds)
    (first, last), *rest = bounds
    return np.stack([_read_joined(reader, owners[number], tuple(rest)) for number in range(first, last)])


def _read_joined(reader: TensorReader, tensors: Mapping[str, tuple[str, Rule]], bounds: Bounds) -> np.ndarray:
    """Reads a block of a parameter, and joins the columns of several tensors by group (`projections.Joined`)."""
    if len(tensors) == 1:
        ((path, (name, rule)),) = tensors.items()
        return reader.block(name, rule, path, bounds)
    *rows, (start, stop) = bounds
    layout = joined(reader.config, _joined_path(next(iter(tensors))))
    width = layout.columns // layout.groups
    first, last = start // width, stop // width
    blocks = []
    for (path, (name, rule)), columns in zip(tensors.items(), layout.widths, strict=True):
        block = reader.block(name, rule, path, (*rows, (first * columns, last * columns)))
        blocks.append(block.reshape(*block.shape[:-1], -1, columns))
    grouped = np.concatenate(blocks, axis=-1)
    return grouped.reshape(*grouped.shape[:-2], -1)


def _expert(path: str) -> int | None:
    """Returns the number of the expert that a part belongs to, or None."""
    match = re.search(r"\.experts\.(\d+)\.", path)
    return int(match[1]) if match else None


def _joined_path(path: str) -> str:
    """Returns the path of the joined projection that a part belongs to, without an expert's number."""
    *parents, part, _ = path.split(".")
    module = next(module for module, parts in JOINED.items() if part in parts)
    return ".".join((*(name for name in parents if not name.isdigit()), module))


def _parts(config: ModelConfig, path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes that fill a parameter: its own, or those of the projections it joins and experts it stacks."""
    *parents, module, kind = path.split(".")
    if module not in JOINED:
        names, sizes = (module,), shape[-1:]
    else:
        layout = joined(config, ".".join((*parents, module)))
        names, sizes = JOINED[module], layout.sizes
    stacked = parents[-1:] == ["experts"]
    owners = [[str(number)] for number in range(shape[0])] if stacked else [[]]
    return {
        ".".join((*parents, *owner, name, kind)): (*shape[stacked:-1], size)
        for owner in owners
        for name, size in zip(names, sizes, strict=True)
    }


def _plan(
    config: ModelConfig, source: TensorSource, needed: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[str, Rule]], list[str]]:
    """Assigns a tensor to each needed part, and lists the tensors that only repeat a tied embedding."""
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
    """Finds the first rule for a tensor name, and the parameter's path."""
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            return rule, None if rule.path is None else match.expand(rule.path)
    return None, None


def raise_misfits(origin: str, *, unknown: list[str], unfilled: list[str], misshapen: list[str]) -> None:
    """Raises one ValueError that lists all mismatches between a checkpoint and its config."""
    parts = (("unknown tensors", unknown), ("parameters without a tensor", unfilled), ("wrong shapes", misshapen))
    if misfits := [f"{title}: {checks.listed(items)}" for title, items in parts if items]:
        raise ValueError(f"{origin} does not fit its config. {'; '.join(misfits)}")


def check_depth(origin: str, config: ModelConfig, paths: Iterable[str]) -> None:
    """Raises ValueError if the config has more layers than the parameters at `paths`.

    This runs before a model of the config's depth is built, which takes time for a wrong large number.
    """
    layers = {match[1] for path in paths if (match := re.match(r"layers\.(\d+)\.", path))}
    if config.num_hidden_layers > len(layers):
        raise ValueError(
            f"{origin} does not fit its config: num_hidden_layers={config.num_hidden_layers}, but there are tensors of "
            f"{len(layers)} layers"
        )


def raise_nonfinite(origin: str, names: Iterable[str]) -> None:
    """Raises ValueError naming tensors that hold NaN or infinite values."""
    if names := sorted(names):
        raise ValueError(
            f"{origin} has NaN or infinite values in {checks.listed(names)}: "
            "load(..., allow_nonfinite=True) or --allow-nonfinite goes on nevertheless"
        )
