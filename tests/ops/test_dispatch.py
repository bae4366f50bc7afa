"""Tests the choice of an op's implementation: by name, or the fastest one that supports the inputs."""

import dataclasses
import json
import logging
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax
from support.tiny import random_ids, tiny_model
from transformers import PreTrainedTokenizerBase

from cuda_ffi import registration
from minikv_jax import layerwise, meshes
from minikv_jax.cache.capacity import capacities, layer_capacity
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.cache.spec import LayerSpec
from minikv_jax.cache.state import LayerCache, Region, empty_region
from minikv_jax.decode import decode
from minikv_jax.methods import lookup
from minikv_jax.methods.kivi import MinMax
from minikv_jax.models import hub
from minikv_jax.models.decoder import Llama
from minikv_jax.models.partition import shard_model
from minikv_jax.ops import dispatch
from minikv_jax.ops.append import append
from minikv_jax.ops.compress import compress
from minikv_jax.ops.decode_attention import decode_attention
from minikv_jax.ops.prefill_attention import prefill_attention
from minikv_jax.ops.quantize import quantize
from minikv_jax.ops.select import Kept
from minikv_jax.packing import Packing
from minikv_jax.prefill import prefill
from pallas_kernels import hopper

SIZES = {"batch": 1, "tokens": 4096}


def refuse() -> str:
    raise NotImplementedError("bits=3")


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that JAX runs on a GPU, without recorded measurements."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="this", compute_capability="9.0")])
    monkeypatch.setattr(dispatch, "recorded", lambda *device: ())


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
def test_without_a_gpu_xla_runs():
    assert dispatch.order("decode_attention", SIZES) == ("xla",)


@pytest.mark.usefixtures("on_gpu")
def test_the_first_that_takes_the_case_runs_and_is_named(caplog: pytest.LogCaptureFixture):
    runners = {"xla": lambda: "xla", "pallas": lambda: "pallas", "cuda": refuse}
    with caplog.at_level(logging.INFO, "minikv_jax"):
        assert dispatch.run("op", None, SIZES, runners) == "pallas"
        assert dispatch.run("op", None, SIZES, runners | {"pallas": refuse}) == "xla"
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].endswith("not cuda: bits=3")
    assert messages[1].endswith(": pallas")
    assert messages[-1].endswith(": xla")


@pytest.mark.usefixtures("on_gpu")
def test_a_named_implementation_runs_or_raises():
    runners = {"xla": lambda: "xla", "pallas": refuse}
    assert dispatch.run("op", "xla", SIZES, runners) == "xla"
    with pytest.raises(NotImplementedError, match="bits=3"):
        dispatch.run("op", "pallas", SIZES, runners)
    with pytest.raises(NotImplementedError, match="op: no 'cuda' kernel"):
        dispatch.run("op", "cuda", SIZES, runners)
    with pytest.raises(ValueError, match="implementation='triton': expected one of xla, pallas, cuda"):
        dispatch.run("op", "triton", SIZES, runners)


@pytest.mark.usefixtures("on_gpu")
def test_a_refusal_lists_every_reason():
    def too_wide() -> str:
        raise NotImplementedError("head_dim=512")

    with pytest.raises(NotImplementedError) as refusal:
        dispatch.run("op", None, SIZES, {"pallas": too_wide, "cuda": refuse})
    assert str(refusal.value) == "op: no implementation supports the case: cuda: bits=3; pallas: head_dim=512"


@pytest.mark.usefixtures("on_gpu")
def test_the_nearest_recorded_shape_decides(monkeypatch: pytest.MonkeyPatch):
    def row(implementation: str, tokens: int, ms: float) -> dict:
        return {"op": "op", "implementation": implementation, "sizes": SIZES | {"tokens": tokens}, "ms": ms}

    times = {1024: (1.0, 2.0), 65536: (9.0, 8.0), 1048576: (9.0, 8.9)}
    recorded = tuple(
        row(name, n, ms) for n, pair in times.items() for name, ms in zip(("cuda", "pallas"), pair, strict=True)
    )
    monkeypatch.setattr(dispatch, "recorded", lambda *device: recorded)
    assert dispatch.order("op", SIZES) == ("cuda", "pallas", "xla")
    assert dispatch.order("op", SIZES | {"tokens": 50000}) == ("pallas", "cuda", "xla")
    assert dispatch.order("op", SIZES | {"tokens": 2_000_000}) == ("cuda", "pallas", "xla")  # about equal
    assert dispatch.order("another op", SIZES) == ("cuda", "pallas", "xla")


@pytest.mark.usefixtures("on_gpu")
def test_rows_of_the_same_sizes_count_alike(monkeypatch: pytest.MonkeyPatch):
    """Keys and values are packed in rows of the same sizes, so neither decides alone."""
    rows = [("cuda", 1.0), ("pallas", 3.0), ("cuda", 2.0), ("pallas", 1.9)]
    recorded = tuple({"op": "op", "implementation": name, "sizes": SIZES, "ms": ms} for name, ms in rows)
    for order in (recorded, recorded[::-1]):
        monkeypatch.setattr(dispatch, "recorded", lambda *device, order=order: order)
        assert dispatch.order("op", SIZES) == ("cuda", "pallas", "xla")


def test_records_of_the_same_device_or_else_of_the_same_architecture(tmp_path: pathlib.Path):
    for device, capability in (("this", "9.0"), ("that", "9.0"), ("older", "8.0")):
        report = {"device": device, "compute_capability": capability, "results": [{"op": device}]}
        (tmp_path / f"kernels_{device}.json").write_text(json.dumps(report))
    assert dispatch.recorded("this", "9.0", tmp_path) == ({"op": "this"},)
    assert dispatch.recorded("another", "9.0", tmp_path) == ({"op": "that"},)  # records of one device only
    assert dispatch.recorded("another", "8.0", tmp_path) == ({"op": "older"},)
    assert dispatch.recorded("another", "12.0", tmp_path) == ()


def test_recorded_rows_have_what_the_choice_reads():
    for path in dispatch.RESULTS.glob("kernels_*.json"):
        report = json.loads(path.read_text())
        assert report["device"]
        assert report["compute_capability"]
        assert report["results"]
        shapes = {name: [] for name in {row["implementation"] for row in report["results"]}}
        for row in report["results"]:
            shapes[row["implementation"]].append((row["op"], row["shape"]))
        assert len({tuple(found) for found in shapes.values()}) == 1  # each implementation has every shape
        for row in report["results"]:
            assert row["implementation"] in dispatch.IMPLEMENTATIONS
            assert row["ms"] > 0
            assert set(row["sizes"]) >= {"batch", "tokens", "kv_heads", "head_dim"}


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="the kernels are there")
@pytest.mark.parametrize("name", ["pallas", "cuda"])
def test_kernels_asked_for_by_name_need_their_gpu(name: str):
    q = jnp.ones((1, 32, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"GPU|build it with"):
        prefill_attention(q, q, q, jnp.array([32]), implementation=name)
    with pytest.raises(NotImplementedError, match=r"GPU|build it with"):
        quantize(q.swapaxes(1, 2), Packing(2, 16, "tokens"), implementation=name)
    tail, nothing = q.swapaxes(1, 2), jnp.zeros(1, jnp.int32)
    layer = LayerCache(empty_region(nothing), Region(tail, tail, nothing, None), None, LayerSpec(lookup.get("full")))
    with pytest.raises(NotImplementedError, match=r"GPU|build it with"):
        decode_attention(q[:, 0], layer, implementation=name)


@pytest.mark.parametrize("mesh", [None, {"model": 2}])
def test_generation_by_pallas_kernels_lowers_without_a_gpu(
    mesh: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
):
    """One program has prefill, packing, append with its flush in a loop, and decode, each by its kernel."""
    monkeypatch.setattr(hopper, "why_unavailable", lambda: None)
    model = tiny_model(dtype="bfloat16", head_dim=64, num_hidden_layers=1, max_position_embeddings=512)
    if mesh is not None:
        model = shard_model(model, meshes.make_mesh(mesh))

    def run(ids: Array) -> Array:
        hidden, cache = prefill(model, ids, jnp.array([300]), "minikv", 150, "pallas")

        def step(_: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
            token = jnp.argmax(model.logits(carry[0]), -1)
            return decode(model, carry[1], token, jnp.ones(1, jnp.int32), "pallas")

        return lax.fori_loop(0, 150, step, (hidden, cache))[0]

    with meshes.use(model.mesh):
        lowered = jax.jit(run).trace(random_ids((1, 300))).lower(lowering_platforms=("cuda",))
    # Attention and column sums; keys and values packed, after the prompt and in the loop; decode.
    assert lowered.as_text().count("@mosaic_gpu") == 2 + 2 * 2 + 1


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize(("k_bits", "v_bits"), [(3, 3), (2, 3)])
def test_three_bits_are_packed_by_cuda_kernels(k_bits: int, v_bits: int, monkeypatch: pytest.MonkeyPatch):
    """After the prompt and for a new token, though nobody names an implementation and Pallas refuses 3 bits."""
    monkeypatch.setattr(registration, "load", lambda: None)
    quantizer = MinMax(k_bits=k_bits, v_bits=v_bits, metadata_dtype="float8_e4m3fn")
    method = dataclasses.replace(lookup.get("minikv"), quantizer=quantizer)
    kept = Kept(jnp.broadcast_to(jnp.arange(75), (1, 2, 75)), jnp.array([75]))
    spec, capacity = LayerSpec(method), layer_capacity(method, method.heavy, 150, 8)

    def run(prompt: Array, token: Array) -> LayerCache:
        layer = compress(prompt, prompt, kept, capacity, spec)
        return append(layer, token, token, jnp.array([1]), jnp.array([[150]]))

    shapes = (jax.ShapeDtypeStruct((1, tokens, 2, 64), jnp.bfloat16) for tokens in (150, 1))
    text = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@minikv_quantize") == 2
    assert text.count("@minikv_append") == 1


@pytest.fixture(scope="module")
def bfloat16_model() -> tuple[Llama, PreTrainedTokenizerBase]:
    """SmolLM2 in bfloat16, which the kernels read."""
    model, tokenizer = hub.load(hub.DEMO_MODEL, dtype="bfloat16")
    assert tokenizer is not None
    return model, tokenizer


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cuda", "pallas"])
@pytest.mark.parametrize("name", ["minikv", "kivi-4", "full", "twin-4bit"])
def test_a_layers_cache_reads_alike(
    name: str, implementation: str, bfloat16_model: tuple[Llama, PreTrainedTokenizerBase]
):
    """XLA and the kernel attend to the same stored layers, compared with float32 maths over what is stored."""
    model, _ = bfloat16_model
    rng = np.random.default_rng(0)
    prompt, lengths, method = rng.integers(0, model.config.vocab_size, (1, 700)), np.array([700]), lookup.get(name)
    layers = layerwise.prefill_layers(model, prompt, lengths, True, "xla")[1]
    sizes = capacities(model.config, method, 700, 1)
    layer = layerwise.compress_layers(model.config, method, layers, lengths, lengths, sizes, "xla").cache.parts[3]
    q = jnp.asarray(rng.normal(size=(1, 9, 64)), jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, layer)
    exact = decode_attention(q.astype(jnp.float32), wide, implementation="xla")
    by_xla = decode_attention(q, layer, implementation="xla").astype(jnp.float32)
    by_kernel = decode_attention(q, layer, implementation=implementation).astype(jnp.float32)
    assert jnp.linalg.norm(by_kernel - exact) <= 2 * jnp.linalg.norm(by_xla - exact) + 1e-6


@pytest.mark.parametrize(
    "name", ["minikv", "minikv-pyramid", "kivi-2", "kivi-4", "q-hitter", "twin-4bit", "twin-4bit-half"]
)
def test_methods_that_the_kernels_run(name: str):
    """The main methods stay within what CUDA kernels pack and read: 2 or 4 bits, groups of 16 to 128."""
    quantizer = lookup.get(name).quantizer
    assert isinstance(quantizer, MinMax)
    assert quantizer.kernel_packs
    assert quantizer.kernel_reads
    assert quantizer.k_bits in (2, 4)
    assert quantizer.v_bits in (2, 4)
    assert 16 <= quantizer.group_size <= 128
