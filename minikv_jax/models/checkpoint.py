"""Saves and restores a model as an Orbax checkpoint: parameters by dotted path, and the config as JSON."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from minikv_jax import files
from minikv_jax.arrays import resolve_dtype
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import Llama
from minikv_jax.models.directory import check_links, member
from minikv_jax.models.parameters import Skeleton, check_depth, raise_misfits, raise_nonfinite
from minikv_jax.models.partition import check_mesh, placement
from minikv_jax.orbax_errors import naming_damage, naming_failure

if TYPE_CHECKING:
    import orbax.checkpoint

# Functions import Orbax themselves, because that takes about a second and most runs neither save nor restore.

_KIND = "minikv_jax checkpoint"
_CONFIG = "config/metadata"  # the file name that Orbax's JSON handler uses
_COLUMNS = {"joined_columns": "by KV head"}  # the layout of `decoder.Joined`


def save(model: Llama, directory: str | os.PathLike[str]) -> None:
    """Writes a model's parameters and config to a new directory for `restore`.

    Args:
      model: the model to save.
      directory: a path that does not exist yet.

    Raises:
      FileExistsError: `directory` already exists.
      OSError: `directory` cannot be written. Nothing is left behind.
    """
    import orbax.checkpoint as ocp

    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    arguments = ocp.args.Composite(
        params=ocp.args.StandardSave(_nest(flat)),
        config=ocp.args.JsonSave(model.config.to_dict() | _COLUMNS),
    )
    with files.replacing(directory, patience=0, new=True) as part, naming_failure(), _checkpointer() as checkpointer:
        checkpointer.save(part, arguments)


def is_checkpoint(directory: str | os.PathLike[str]) -> bool:
    """Tells whether a directory looks like one written by `save`."""
    path = pathlib.Path(directory)
    return (path / "_CHECKPOINT_METADATA").is_file() or (path / "params" / "_METADATA").is_file()


def restore_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """Reads the config of a checkpoint without its parameters. Raises the same errors as `restore`."""
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist")
    path = member(directory, _CONFIG)
    if not path.is_file():
        raise ValueError(f"{directory} is not a complete {_KIND}: {_CONFIG} is missing")
    fields = files.read_json(path)
    columns = {name: fields.pop(name, None) for name in _COLUMNS}
    config = ModelConfig.from_dict(fields, path)
    if columns != _COLUMNS:
        raise ValueError(
            f"{directory} was saved by an earlier version, which ordered the columns of joined projections otherwise: "
            "load the original checkpoint and save it again"
        )
    return config


def restore(
    directory: str | os.PathLike[str],
    *,
    dtype: DTypeLike = jnp.float32,
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> Llama:
    """Restores a model written by `save`, cast to `dtype` and placed on `mesh`.

    Args:
      directory: the directory written by `save`.
      dtype: float32, bfloat16 or float16.
      mesh: devices to split the model over; any mesh will do, whichever the model was saved from. None: JAX's default
        device.
      allow_nonfinite: accept parameters with NaN or infinite values.

    Returns:
      The model.

    Raises:
      FileNotFoundError: `directory` does not exist.
      ValueError: the checkpoint is incomplete, or parameters do not fit the config or, unless allowed, are not finite
        in `dtype`. One message lists them all.
    """
    import orbax.checkpoint as ocp

    directory, resolved = pathlib.Path(directory).absolute(), resolve_dtype(dtype)
    config = restore_config(directory)
    mesh = None if mesh is None else check_mesh(config, mesh)
    check_links(directory, ["**/*"])
    for name in ("_CHECKPOINT_METADATA", "params/_METADATA"):  # Orbax would print an error and go on
        if (directory / name).exists():
            files.read_json(directory / name)
    with _checkpointer() as checkpointer, naming_damage(directory, _KIND):
        described = checkpointer.metadata(directory).item_metadata.get("params")
        if described is None:
            raise ValueError("params/_METADATA is missing")
        stored = _flatten(described.tree)
    check_depth(str(directory), config, stored)
    skeleton = Skeleton.of(config, resolved)
    _check_stored(directory, {path: tuple(leaf.shape) for path, leaf in stored.items()}, skeleton)
    targets = {
        path: jax.ShapeDtypeStruct(leaf.shape, resolved, sharding=placement(path, config, mesh))
        for path, leaf in skeleton.parameters.items()
    }
    with _checkpointer() as checkpointer, naming_damage(directory, _KIND):
        item = ocp.args.StandardRestore(_nest(targets))
        arrays = checkpointer.restore(directory, ocp.args.Composite(params=item))["params"]
    parameters = _flatten(arrays)
    if not allow_nonfinite:
        raise_nonfinite(str(directory), [path for path, array in parameters.items() if not _is_finite(array)])
    return skeleton.fill(parameters, mesh)


@jax.jit
def _is_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def _checkpointer() -> orbax.checkpoint.Checkpointer:
    import orbax.checkpoint as ocp

    json = ocp.JsonCheckpointHandler()  # also for "tokenizer": without a handler, Orbax would warn about it
    handlers = {"params": ocp.StandardCheckpointHandler(), "config": json, "tokenizer": json}
    return ocp.Checkpointer(ocp.CompositeCheckpointHandler(**handlers))


def _check_stored(directory: pathlib.Path, stored: Mapping[str, tuple[int, ...]], skeleton: Skeleton) -> None:
    """Raises ValueError listing all stored parameters that do not match the config."""
    parameters = skeleton.parameters
    raise_misfits(
        str(directory),
        unknown=[path for path in stored if path not in parameters],
        unfilled=[path for path in parameters if path not in stored],
        misshapen=[
            f"{path} is {list(stored[path])}, the config needs {list(leaf.shape)}"
            for path, leaf in parameters.items()
            if stored.get(path, leaf.shape) != leaf.shape
        ],
    )


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a nested dict to one level with dotted paths as keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nests a flat dict again; the inverse of `_flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
