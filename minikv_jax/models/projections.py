"""Linear projections: joined ones, whose columns are grouped by KV head, and those split by rows over devices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from minikv_jax import meshes
from minikv_jax.meshes import DATA, MODEL, constrain
from minikv_jax.models.config import ModelConfig

# Sums the devices' partial results of a projection that is split by rows; called inside `jax.shard_map`.
Reduce = Callable[[jax.Array], jax.Array]

# Projections of the same input are one matmul, so that a decode step runs fewer and longer kernels.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Joined(NamedTuple):
    """Column layout of a joined projection: `groups` times [columns of the first part | of the second | ...].

    A group is a KV head with its query heads, or the MLP columns on the same device as that head. Each device can then
    hold whole groups and needs no columns of the others.

    Attributes:
      groups: number of groups.
      widths: columns of each part within a group, in the order of `JOINED`.
    """

    groups: int
    widths: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Columns of each part, in all groups together."""
        return tuple(self.groups * width for width in self.widths)

    @property
    def columns(self) -> int:
        """Columns of all parts together."""
        return sum(self.sizes)

    def grouped(self, x: Float[Array, "B T C"]) -> Float[Array, "B T groups width"]:
        """Reshapes the projection's result to its groups."""
        return constrain(x.reshape(*x.shape[:-1], self.groups, -1), DATA, None, MODEL)


def joined(config: ModelConfig, path: str) -> Joined:
    """Returns the column layout of the joined projection at a dotted path, which ends in a key of `JOINED`."""
    *_, parent, module = "", *path.split(".")
    h, kv_heads, experts = config.head_dim, config.num_key_value_heads, config.experts
    if module == "qkv_proj":
        return Joined(kv_heads, (config.num_attention_heads // kv_heads * h, h, h))
    if experts is not None and parent in ("experts", "shared_expert"):
        return mlp_columns(config, experts.intermediate_size if parent == "experts" else experts.shared_size)
    return mlp_columns(config, config.intermediate_size)


def mlp_columns(config: ModelConfig, size: int) -> Joined:
    """Returns the column layout of the joined projection of an MLP with `size` hidden channels."""
    groups = math.gcd(config.num_key_value_heads, size)
    return Joined(groups, (size // groups, size // groups))


def linear(dtype: DTypeLike, rngs: nnx.Rngs) -> Callable[..., nnx.Linear]:
    """Returns the class of linear layers of a dtype."""
    return functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, precision=precision(dtype), rngs=rngs)


def precision(dtype: DTypeLike) -> lax.Precision | None:
    """The matmul precision that keeps float32 exact; a GPU's default is TF32, with 10 bits of mantissa."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def sum_over_devices(x: jax.Array) -> jax.Array:
    """Sums `x` over the devices of the axis "model" with XLA's collective."""
    return lax.psum(x, MODEL)


def project_by_rows(linear: nnx.Linear, x: Float[Array, "B T F"], reduce: Reduce) -> Float[Array, "B T D"]:
    """Computes `linear(x)` with the rows of its kernel split over the devices of a mesh."""

    def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.matmul(x, kernel, precision=linear.precision)

    def product_of_one_device(x: jax.Array, kernel: jax.Array) -> jax.Array:
        if x.shape[0] * x.shape[1] > 1 or kernel.size >= 10**7:
            return product(x, kernel)
        # On a GPU, XLA turns one row times a matrix below this size into sums over products that it writes out (21 us
        # for 8 million numbers on an H200). Two equal rows stay a matmul.
        return product(lax.optimization_barrier(jnp.concatenate([x, x], axis=1)), kernel)[:, :1]

    kernel = linear.kernel[...]
    split = meshes.size(MODEL) > 1
    out = meshes.sum_of_products(x, kernel, product_of_one_device, reduce) if split else product(x, kernel)
    out = constrain(out, DATA)
    return out if linear.bias is None else out + linear.bias[...]
