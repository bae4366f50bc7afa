"""`minikv memory`: compute the bytes of a cache from the model's config."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from minikv_jax import meshes
from minikv_jax.cache import memory
from minikv_jax.cache.capacity import LayerCapacity
from minikv_jax.cache.spec import check_heads_stay_together
from minikv_jax.cli import devices, output, shared
from minikv_jax.methods.method import Method
from minikv_jax.models import hub
from minikv_jax.models.config import ModelConfig
from minikv_jax.models.huggingface import config_from_hf
from minikv_jax.models.partition import device_part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the model, the method and the sizes."""
    source = parser.add_mutually_exclusive_group(required=True)
    shared.add_model(source, required=False)
    source.add_argument("--config", type=pathlib.Path, metavar="FILE", help="a Hugging Face config.json")
    shared.add_method(parser, default="minikv")
    shared.add_settings(parser)
    parser.add_argument(
        "--prompt-len", "--prompt", type=shared.integer, required=True, metavar="N", help="prompt tokens"
    )
    shared.add_max_new_tokens(parser, 128, "--new")
    parser.add_argument("--batch", type=shared.integer, default=1, metavar="B", help="rows; default: %(default)s")
    shared.add_dtype(parser, "bfloat16")
    devices.add_mesh(parser)
    shared.add_json(parser)
    shared.add_verbose(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the bytes of each part of the cache, and the speedup that they allow."""
    method = shared.read_method(arguments)
    if arguments.model is None:
        model = config_from_hf(arguments.config)
    else:
        model = hub.load_config(arguments.model)
    report = memory.report(
        model,
        method,
        prompt_length=arguments.prompt_len,
        max_new_tokens=arguments.max_new_tokens,
        batch=arguments.batch,
        dtype=arguments.dtype,
    )
    weights = memory.weight_bytes(model, arguments.dtype)
    device = None if arguments.mesh is None else _on_each_device(arguments, model, method, report)
    output.print_rows(_rows(arguments, report, weights) | ({} if device is None else _device_rows(device)))
    output.write_json(arguments.json, _values(arguments, method, report, weights) | {"device": device})
    return 0


def _on_each_device(
    arguments: argparse.Namespace, model: ModelConfig, method: Method, report: memory.MemoryReport
) -> dict[str, int]:
    """Devices of --mesh, and what each holds."""
    data, shards = (arguments.mesh.get(axis, 1) for axis in meshes.AXES)
    check_heads_stay_together(method, shards)
    meshes.check_multiple("rows", arguments.batch, meshes.DATA, data)
    weights = memory.weight_bytes(device_part(model, shards), arguments.dtype)
    return {"count": data * shards, "bytes": report.device_bytes(data, shards), "weight_bytes": weights}


def _device_rows(device: dict[str, int]) -> dict[str, str]:
    return {"each of the devices": f"{device['bytes']:,} bytes of cache, {device['weight_bytes']:,} of weights"}


def _rows(arguments: argparse.Namespace, report: memory.MemoryReport, weights: int) -> dict[str, str]:
    cache_share = report.bytes / (weights + report.bytes)
    full_share = report.full_bytes / (weights + report.full_bytes)
    kept = output.span([layer.kept for layer in report.layers])
    if whole := [layer.retrieval.kept for layer in report.layers if layer.retrieval is not None]:
        kept += f" (retrieval heads {output.span(whole)})"
    return {
        "packed": f"{report.packed_bytes:,} bytes",
        "full-precision tail": f"{report.tail_bytes:,} bytes",
        "lengths, positions": f"{report.index_bytes:,} bytes",
        "allocated in all": f"{report.bytes:,} bytes for {arguments.prompt_len:,} prompt tokens and "
        f"{arguments.max_new_tokens:,} new ones",
        "full cache": f"{report.full_bytes:,} bytes ({arguments.dtype})",
        "saved": f"{max(report.full_bytes - report.bytes, 0):,} bytes ({max(report.saved, 0):.1%})",
        "kept per layer": f"{kept} of {arguments.prompt_len:,} tokens",
        "bytes per layer": output.span(report.layer_bytes),
        "a decode step reads": f"{weights:,} bytes of weights; the cache is {cache_share:.0%} of its bytes, "
        f"a full one {full_share:.0%}",
        "maximum speedup": f"{report.step_saved(weights):.2f}x (if decoding is memory-bound)",
    }


def _values(arguments: argparse.Namespace, method: Method, report: memory.MemoryReport, weights: int) -> dict[str, Any]:
    return {
        "model": arguments.model or str(arguments.config),
        "method": method.name,
        "settings": dict(arguments.set),
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "prompt_tokens": arguments.prompt_len,
        "max_new_tokens": arguments.max_new_tokens,
        "packed_bytes": report.packed_bytes,
        "tail_bytes": report.tail_bytes,
        "index_bytes": report.index_bytes,
        "bytes": report.bytes,
        "full_bytes": report.full_bytes,
        "weight_bytes": weights,
        "step_saved": report.step_saved(weights),
        "per_layer": [
            _sizes(layer) | {"bytes": size} for layer, size in zip(report.layers, report.layer_bytes, strict=True)
        ],
    }


def _sizes(layer: LayerCapacity) -> dict[str, Any]:
    sizes = {"kept": layer.kept, "packed": layer.packed, "tail": layer.tail}
    return sizes if layer.retrieval is None else sizes | {"retrieval_heads": _sizes(layer.retrieval)}
