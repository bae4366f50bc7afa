"""Checkpoints into the Flax model: Hugging Face safetensors, GGUF, and Orbax (save and restore).

A table per format maps every tensor name to a parameter. The parameters' shapes come from `nnx.eval_shape`, so nothing
is allocated before the names and shapes are known to fit. Parameters then go one by one, in blocks of rows, to the
device in the model's dtype: beside the memory-mapped checkpoint the host holds one parameter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from minikv_jax.models.config import ModelConfig
from minikv_jax.models.decoder import JOINED, Llama, joined_widths, resolve_dtype
from minikv_jax.models.gguf import GGUFFile, config_from_gguf


@dataclasses.dataclass(frozen=True)
class Rule:
    """Tensor names that match `pattern` in full fill the parameter at `path`; no path: the tensor is not needed.

    A path may name a part of a joined projection (`model.JOINED`) as if it were a parameter. Both formats store
    matrices `[out, in]`; a path that ends in "kernel" is transposed. `heads` names the config field with the number of
    heads whose channels llama.cpp has reordered.
    """

    pattern: str
    path: str | None
    heads: str | None = None


SAFETENSORS_RULES = (
    Rule(r"model\.embed_tokens\.weight", "embed_tokens.embedding"),
    Rule(r"model\.norm\.weight", "norm.scale"),
    Rule(r"lm_head\.weight", "lm_head.kernel"),
    Rule(r"model\.layers\.(\d+)\.(input_layernorm|post_attention_layernorm)\.weight", r"layers.\1.\2.scale"),
    Rule(r"model\.layers\.(\d+)\.self_attn\.([qk]_norm)\.weight", r"layers.\1.self_attn.\2.scale"),
    Rule(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.weight", r"layers.\1.\2.\3.kernel"),
    Rule(r"model\.layers\.(\d+)\.(self_attn|mlp)\.(\w+_proj)\.bias", r"layers.\1.\2.\3.bias"),
    Rule(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", None),  # Llama 2 files; computed from the config
)

GGUF_RULES = (
    Rule(r"token_embd\.weight", "embed_tokens.embedding"),
    Rule(r"output_norm\.weight", "norm.scale"),
    Rule(r"output\.weight", "lm_head.kernel"),
    Rule(r"rope_freqs\.weight", None),  # in the config as rope_scaling
    Rule(r"blk\.(\d+)\.attn_norm\.weight", r"layers.\1.input_layernorm.scale"),
    Rule(r"blk\.(\d+)\.ffn_norm\.weight", r"layers.\1.post_attention_layernorm.scale"),
    Rule(r"blk\.(\d+)\.attn_([qk])_norm\.weight", r"layers.\1.self_attn.\2_norm.scale"),
    Rule(r"blk\.(\d+)\.attn_([qkv])\.weight", r"layers.\1.self_attn.\2_proj.kernel"),
    Rule(r"blk\.(\d+)\.attn_([qkv])\.bias", r"layers.\1.self_attn.\2_proj.bias"),
    Rule(r"blk\.(\d+)\.attn_output\.weight", r"layers.\1.self_attn.o_proj.kernel"),
    Rule(r"blk\.(\d+)\.attn_output\.bias", r"layers.\1.self_attn.o_proj.bias"),
    Rule(r"blk\.(\d+)\.ffn_(gate|up|down)\.weight", r"layers.\1.mlp.\2_proj.kernel"),
    Rule(r"blk\.(\d+)\.ffn_(gate|up|down)\.bias", r"layers.\1.mlp.\2_proj.bias"),
)

# The "llama" architecture of llama.cpp rotates neighbouring channels, so its files hold q and k reordered.
# The first match wins.
GGUF_LLAMA_RULES = (
    Rule(r"blk\.(\d+)\.attn_q\.weight", r"layers.\1.self_attn.q_proj.kernel", heads="num_attention_heads"),
    Rule(r"blk\.(\d+)\.attn_k\.weight", r"layers.\1.self_attn.k_proj.kernel", heads="num_key_value_heads"),
    Rule(r"blk\.(\d+)\.attn_q\.bias", r"layers.\1.self_attn.q_proj.bias", heads="num_attention_heads"),
    Rule(r"blk\.(\d+)\.attn_k\.bias", r"layers.\1.self_attn.k_proj.bias", heads="num_key_value_heads"),
    *GGUF_RULES,
)

_BLOCK_ELEMENTS = 1 << 22  # values converted at a time: 16 MB of float32


@dataclasses.dataclass(frozen=True)
class _Source:
    """Named tensors of a checkpoint. `read_rows(name, start, stop)` slices the first axis."""

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    read_rows: Callable[[str, int, int], np.ndarray]
    rules: tuple[Rule, ...]


def load_safetensors(directory: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Llama:
    """Loads a Hugging Face model directory: config.json and model.safetensors, single or sharded with its index.

    Parameters are cast to `dtype` (float32, bfloat16 or float16) and placed on JAX's default device.
    Raises FileNotFoundError, or ValueError naming the file for a corrupt one, an unsupported config, and tensors that
    are missing, unknown or of the wrong shape (all of them in one message).
    """
    directory = pathlib.Path(directory)
    config = ModelConfig.from_hf(directory)
    handles = _open_shards(directory)
    slices = {name: handle.get_slice(name) for handle in handles for name in handle.keys()}  # noqa: SIM118 (no mapping)
    kinds = {name: tensor.get_dtype() for name, tensor in slices.items()}
    if odd := [f"{name} ({kind})" for name, kind in kinds.items() if kind not in ("F64", "F32", "F16", "BF16")]:
        raise ValueError(f"{directory}: tensors of a type that is not plain floating point: {', '.join(sorted(odd))}")
    source = _Source(
        origin=str(directory),
        shapes={name: tuple(tensor.get_shape()) for name, tensor in slices.items()},
        read_rows=lambda name, start, stop: slices[name][start:stop],
        rules=SAFETENSORS_RULES,
    )
    return _fill(config, source, resolve_dtype(dtype))


def load_gguf(file: GGUFFile | str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Llama:
    """Loads a GGUF file of a supported architecture, dequantised to `dtype`, config included.

    Raises FileNotFoundError, or ValueError naming the file for a corrupt one, an unsupported setting, and tensors that
    are missing, unknown or of the wrong shape (all of them in one message).
    """
    file = file if isinstance(file, GGUFFile) else GGUFFile(file)
    llama = file.metadata.get("general.architecture") == "llama"
    source = _Source(
        origin=str(file.path),
        shapes={name: tensor.shape for name, tensor in file.tensors.items()},
        read_rows=file.read_rows,
        rules=GGUF_LLAMA_RULES if llama else GGUF_RULES,
    )
    return _fill(config_from_gguf(file), source, resolve_dtype(dtype))


def _open_shards(directory: pathlib.Path) -> list[safe_open]:
    """Every safetensors file of the model, checked against the index where there is one."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(
                f"{directory} has neither {single.name} nor {index.name}; other formats are not read"
            )
        return [_open_shard(single)]
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index: {error!r}") from error
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(missing)}")
    handles = {name: _open_shard(directory / name) for name in names}
    listed = set(weight_map.items())
    stored = {(tensor, name) for name, handle in handles.items() for tensor in handle.keys()}  # noqa: SIM118
    if listed != stored:
        wrong = sorted(f"{tensor} in {name}" for tensor, name in listed ^ stored)
        raise ValueError(f"{index} disagrees with its files about: {', '.join(wrong)}")
    return list(handles.values())


def _open_shard(path: pathlib.Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error


def _skeleton(config: ModelConfig, dtype: DTypeLike) -> tuple[Any, dict[str, Any]]:
    """The model's structure and its parameters by dotted path, as shapes only."""
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    return graph, {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _merge(graph: Any, parameters: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> Llama:
    """The model with `arrays` in the places of the shapes."""
    flat: dict[Any, Any] = {_path(name): leaf.replace(arrays[name]) for name, leaf in parameters.items()}
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(part) if part.isdigit() else part for part in name.split("."))


def _fill(config: ModelConfig, source: _Source, dtype: np.dtype) -> Llama:
    """A model of `config` with the tensors of `source`. Raises ValueError listing everything that does not fit."""
    graph, parameters = _skeleton(config, dtype)
    parts = {path: _parts(config, path, leaf.shape) for path, leaf in parameters.items()}
    plan, repeats = _plan(config, source, {name: shape for part in parts.values() for name, shape in part.items()})
    arrays: dict[str, jax.Array] = {}
    for path, part in parts.items():
        hosts = [_to_parameter(_read(source, plan[name][0], dtype), plan[name][1], name, config) for name in part]
        host = hosts[0] if len(hosts) == 1 else np.concatenate(hosts, axis=-1)
        arrays[path] = jnp.array(host).block_until_ready()  # a copy, done before the host buffer is dropped
    for name in repeats:
        if not jnp.array_equal(_read(source, name, dtype), arrays["embed_tokens.embedding"]):
            raise ValueError(f"{source.origin}: tie_word_embeddings is true, but {name} differs from the embedding")
    return _merge(graph, parameters, arrays)


def _parts(config: ModelConfig, path: str, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """What a checkpoint's tensors fill of a parameter: all of it, or blocks of columns, in order; names and shapes."""
    *parents, module, kind = path.split(".")
    if module not in JOINED:
        return {path: shape}
    widths = joined_widths(config, module)
    return {".".join((*parents, name, kind)): (*shape[:-1], width) for name, width in widths.items()}


def _plan(
    config: ModelConfig, source: _Source, wanted: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[str, Rule]], list[str]]:
    """Which tensor fills what is wanted, given by shape, and the tensors that only repeat a tied embedding."""
    plan: dict[str, tuple[str, Rule]] = {}
    repeats: list[str] = []
    unknown, misshapen = [], []
    for name, shape in source.shapes.items():
        rule, path = _match(name, source.rules)
        if rule is not None and path is None:
            continue
        if path == "lm_head.kernel" and config.tie_word_embeddings:
            repeats.append(name)
        elif rule is None or path is None or path not in wanted:
            unknown.append(name)
        else:
            plan[path] = name, rule
            needed = wanted[path]
            needed = needed[::-1] if path.endswith("kernel") else needed
            if shape != needed:
                misshapen.append(f"{name} is {list(shape)}, the config needs {list(needed)}")
    unfilled = [path for path in wanted if path not in plan]
    _raise_misfits(source.origin, unknown=unknown, unfilled=unfilled, misshapen=misshapen)
    return plan, repeats


def _match(name: str, rules: Iterable[Rule]) -> tuple[Rule | None, str | None]:
    """The first rule for a tensor name, and the parameter it stands for."""
    for rule in rules:
        if match := re.fullmatch(rule.pattern, name):
            return rule, None if rule.path is None else match.expand(rule.path)
    return None, None


def _raise_misfits(origin: str, *, unknown: list[str], unfilled: list[str], misshapen: list[str]) -> None:
    """Raises one ValueError that lists everything that keeps a checkpoint from being the model of its config."""
    parts = (("unknown tensors", unknown), ("parameters without a tensor", unfilled), ("wrong shapes", misshapen))
    if found := [f"{title}: {', '.join(items)}" for title, items in parts if items]:
        raise ValueError(f"{origin} does not fit its config. {'; '.join(found)}")


def _read(source: _Source, name: str, dtype: np.dtype) -> np.ndarray:
    """A whole tensor in `dtype`, converted block by block so that only one copy of it exists."""
    shape = source.shapes[name]
    out = np.empty(shape, dtype)
    step = max(1, _BLOCK_ELEMENTS // max(1, out[:1].size))
    for start in range(0, shape[0], step):
        out[start : start + step] = source.read_rows(name, start, min(start + step, shape[0]))
    return out


def _to_parameter(array: np.ndarray, rule: Rule, path: str, config: ModelConfig) -> np.ndarray:
    """The tensor in the layout of its parameter."""
    if rule.heads is not None:
        # llama.cpp stores channel i of a head's first half next to channel i of its second half.
        heads = getattr(config, rule.heads)
        pairs = array.reshape(heads, config.head_dim // 2, 2, *array.shape[1:])
        array = pairs.swapaxes(1, 2).reshape(array.shape)
    return array.T if path.endswith("kernel") else array


def save(model: Llama, directory: str | os.PathLike[str]) -> None:
    """Writes parameters and config as an Orbax checkpoint; `restore` reads it.

    Raises ValueError where `directory` already exists.
    """
    directory = pathlib.Path(directory).absolute()
    if directory.exists():
        raise ValueError(f"{directory} already exists: give a new directory")
    flat = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model))}
    arguments = ocp.args.Composite(
        params=ocp.args.StandardSave(_nest(flat)),
        config=ocp.args.JsonSave(model.config.to_dict()),
    )
    with ocp.Checkpointer(_orbax_handler()) as checkpointer:
        checkpointer.save(directory, arguments)


def is_orbax(directory: str | os.PathLike[str]) -> bool:
    """Whether a directory looks like one that `save` wrote."""
    path = pathlib.Path(directory)
    return (path / "_CHECKPOINT_METADATA").is_file() or (path / "params" / "_METADATA").is_file()


def restore_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """The config of what `save` wrote, without the parameters. Raises as `restore` does."""
    directory = pathlib.Path(directory).absolute()
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist")
    with ocp.Checkpointer(_orbax_handler()) as checkpointer, _naming(directory):
        stored = checkpointer.restore(directory, ocp.args.Composite(config=ocp.args.JsonRestore()))
        return ModelConfig.from_dict(stored["config"])


def restore(directory: str | os.PathLike[str], *, dtype: DTypeLike = jnp.float32) -> Llama:
    """Reads what `save` wrote, cast to `dtype`, onto JAX's default device.

    Raises FileNotFoundError, or ValueError naming the directory where it is not a complete checkpoint or where its
    parameters do not fit its config (all of them in one message).
    """
    directory, resolved = pathlib.Path(directory).absolute(), resolve_dtype(dtype)
    graph, parameters = _skeleton(restore_config(directory), resolved)
    device = jax.sharding.SingleDeviceSharding(jnp.zeros(()).devices().pop())
    wanted = {path: jax.ShapeDtypeStruct(leaf.shape, resolved, sharding=device) for path, leaf in parameters.items()}
    with ocp.Checkpointer(_orbax_handler()) as checkpointer:
        with _naming(directory):
            stored = _flatten(checkpointer.metadata(directory).item_metadata["params"].tree)
        _check_stored(directory, {path: tuple(leaf.shape) for path, leaf in stored.items()}, parameters)
        with _naming(directory):
            item = ocp.args.StandardRestore(_nest(wanted))
            arrays = checkpointer.restore(directory, ocp.args.Composite(params=item))["params"]
    return _merge(graph, parameters, _flatten(arrays))


@contextlib.contextmanager
def _naming(directory: pathlib.Path) -> Iterator[None]:
    """Turns what Orbax raises for damaged files into one ValueError that names the directory."""
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory} is not a complete minikv_jax checkpoint: {error}") from error


def _orbax_handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(params=ocp.StandardCheckpointHandler(), config=ocp.JsonCheckpointHandler())


def _check_stored(
    directory: pathlib.Path, stored: Mapping[str, tuple[int, ...]], parameters: Mapping[str, Any]
) -> None:
    """Raises ValueError listing all stored parameters that are not those of the config."""
    _raise_misfits(
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
    """A nested dict as one level of dotted paths."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `_flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
