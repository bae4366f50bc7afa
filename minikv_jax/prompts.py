"""Checks and pads the inputs of a generation: prompts, positions, devices, a cache to continue from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from minikv_jax import meshes
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.checks import shown
from minikv_jax.decode import check_same_model
from minikv_jax.methods.method import Method
from minikv_jax.models.decoder import Llama


def bucket_length(tokens: int, limit: int | None = None) -> int:
    """Padded length of a prompt: a multiple of 1/8 of the next power of two, so that few programs are compiled.

    Args:
      tokens: length of the longest prompt.
      limit: number of the model's positions; a prompt that fits is never padded beyond it.
    """
    step = 64 if tokens <= 64 else 1 << ((tokens - 1).bit_length() - 3)
    bucket = -(-tokens // step) * step
    return bucket if limit is None else max(min(bucket, limit), tokens)


def pad_prompts(prompts: Any, vocab_size: int, positions: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Pads prompts to int32 ids and lengths. Raises ValueError naming the first prompt that is not token ids."""
    is_array = isinstance(prompts, np.ndarray | jax.Array)
    if isinstance(prompts, str) or not (prompts.ndim if is_array else isinstance(prompts, Sequence)):
        raise ValueError(f"prompts={shown(prompts)}: expected sequences of token ids, one per row")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: expected at least one sequence of token ids")
    rows = [_row(index, prompt) for index, prompt in enumerate(prompts)]
    for index, row in enumerate(rows):
        outside = row[(row < 0) | (row >= vocab_size)]
        if outside.size:
            raise ValueError(f"prompt {index} has token id {outside[0]}: expected 0..{vocab_size - 1}")
    lengths = np.array([row.size for row in rows], np.int32)
    ids = np.zeros((len(rows), bucket_length(int(lengths.max()), positions)), np.int32)
    for index, row in enumerate(rows):
        ids[index, : row.size] = row
    return ids, lengths


def _row(index: int, prompt: Any) -> np.ndarray:
    try:
        row = np.asarray(prompt)
    except ValueError as error:  # lists of several lengths
        raise ValueError(f"prompt {index} is no sequence of token ids: {error}") from error
    if row.ndim != 1 or row.size == 0:
        raise ValueError(f"prompt {index} has shape {row.shape}: expected a non-empty sequence of token ids")
    if not np.issubdtype(row.dtype, np.integer):
        raise ValueError(f"prompt {index} has dtype {row.dtype}: expected integer token ids")
    return row


def check_positions(model: Llama, prompt_tokens: int, new_tokens: int, seen: int = 0) -> None:
    """Raises ValueError if the model has too few positions. `seen` tokens are in the cache already."""
    positions = model.config.max_position_embeddings
    if seen + prompt_tokens + new_tokens > positions:
        before = f"{seen} tokens of the cache + " if seen else ""
        raise ValueError(
            f"{before}{prompt_tokens} prompt tokens + {new_tokens} new ones exceed the model's {positions} positions"
        )


def check_second_run(model: Llama, prompt_tokens: int, method: Method) -> None:
    """Raises ValueError if the model has too few positions for what a method puts after a prompt to choose tokens."""
    positions = model.config.max_position_embeddings
    longest = method.longest_prompt(positions)
    if prompt_tokens > longest:
        raise ValueError(
            f"{prompt_tokens} prompt tokens: the model's {positions} positions leave room for {longest}, because the "
            f"method runs a prompt twice ({method.scorer.__class__.__name__}, lookahead={method.lookahead})"
        )


def check_rows(batch: int, mesh: Mesh | None) -> None:
    """Raises ValueError unless the batch is a multiple of the mesh's axis "data"."""
    meshes.check_multiple("rows", batch, meshes.DATA, 1 if mesh is None else mesh.shape[meshes.DATA])


def check_devices(model: Llama, cache: KVCache | None) -> None:
    """Raises ValueError unless the model and the cache are on one mesh, or both on one device."""
    if model.mesh is None and meshes.ambient() is not None:
        raise ValueError("a mesh is set, but the model is on one device: load(..., mesh=mesh), or shard_model")
    if cache is None:
        return
    used = next(leaf.sharding.device_set for leaf in jax.tree.leaves(cache))
    if model.mesh is not None and used != set(model.mesh.devices.flat):
        raise ValueError(f"cache is on {len(used)} devices, the model on {model.mesh.size}: place_cache(cache, mesh)")
    if model.mesh is None and len(used) > 1:
        raise ValueError(f"cache is on {len(used)} devices, the model on one: shard_model(model, mesh)")


def check_cache(model: Llama, cache: KVCache, batch: int) -> None:
    """Raises ValueError if a cache was donated, or is of another model, dtype or batch."""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(cache) if isinstance(leaf, jax.Array)):
        raise ValueError("cache was donated to another call: use the one that it returned")
    check_same_model(model, cache)
    if (rows := cache.length.shape[0]) != batch:
        raise ValueError(f"cache has {rows} rows, prompts {batch}: expected the same")
