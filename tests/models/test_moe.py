"""Tests mixtures of experts against NumPy loops over tokens and experts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support.tiny import random_ids, tiny_config, tiny_model

from minikv_jax import meshes
from minikv_jax.models.design import Latent
from minikv_jax.models.experts import Experts
from minikv_jax.models.latent_attention import LatentAttention
from minikv_jax.models.moe import SparseMLP, by_expert, route
from minikv_jax.models.partition import check_mesh, shard_model
from minikv_jax.one_shot import one_shot

SETTINGS: dict[str, dict[str, Any]] = {
    "softmax": {"normalised": True},
    "softmax, not normalised": {"scale": 2.0},
    "softmax of the chosen, biased, clamped": {
        "scoring": "softmax_of_chosen",
        "router_bias": True,
        "bias": True,
        "swiglu_limit": 0.5,
        "swiglu_alpha": 1.7,
    },
    "sigmoid, groups": {
        "scoring": "sigmoid",
        "groups": 4,
        "chosen_groups": 2,
        "correction_bias": True,
        "normalised": True,
        "scale": 2.5,
        "shared_size": 24,
    },
    "sigmoid, weighted inputs": {"scoring": "sigmoid", "weighted_inputs": True, "per_token": 1, "shared_size": 40},
}


def settings(**changes: Any) -> Experts:
    fields: dict[str, Any] = {"count": 8, "per_token": 3, "intermediate_size": 40}
    return Experts(**fields | changes)


def sparse_mlp(experts: Experts) -> SparseMLP:
    """Makes a layer of random weights and biases."""
    config = tiny_config(experts=experts)
    graph, state = nnx.split(nnx.eval_shape(lambda: SparseMLP(config, dtype="float32", rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(1)
    return nnx.merge(graph, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.standard_normal(x.shape, np.float32)), state))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def naive_route(logits: np.ndarray, experts: Experts, correction: np.ndarray) -> dict[int, float]:
    """Returns the weight of each chosen expert of one token."""
    scores = {"softmax": softmax, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "softmax_of_chosen": lambda x: x}
    score = scores[experts.scoring](logits)
    ranked = {number: score[number] + correction[number] for number in range(experts.count)}
    size = experts.count // experts.groups
    groups = [range(first, first + size) for first in range(0, experts.count, size)]
    groups.sort(key=lambda group: -sum(sorted((ranked[number] for number in group), reverse=True)[:2]))
    candidates = [number for group in groups[: experts.chosen_groups] for number in group]
    chosen = sorted(candidates, key=lambda number: -ranked[number])[: experts.per_token]
    weights = np.array([score[number] for number in chosen])
    if experts.scoring == "softmax_of_chosen":
        weights = softmax(weights)
    if experts.normalised:
        weights = weights / weights.sum()
    return dict(zip(chosen, weights * experts.scale, strict=True))


def naive_hidden(gate: np.ndarray, up: np.ndarray, experts: Experts) -> np.ndarray:
    if experts.swiglu_limit is None:
        return gate / (1 + np.exp(-gate)) * up
    gate, up = np.minimum(gate, experts.swiglu_limit), np.clip(up, -experts.swiglu_limit, experts.swiglu_limit)
    return (up + 1) * gate / (1 + np.exp(-experts.swiglu_alpha * gate))


def naive(layer: SparseMLP, x: np.ndarray) -> np.ndarray:
    """Computes the layer for tokens `[S, D]` in float64, one expert of one token at a time."""
    experts, out = layer.settings, np.zeros_like(x, np.float64)
    state = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(layer)))
    router, stacks = state["router_proj"], state["experts"]
    zeros = np.zeros(experts.count)
    for t, token in enumerate(x.astype(np.float64)):
        logits = token @ router["kernel"] + router.get("bias", zeros)
        for number, weight in naive_route(logits, experts, state.get("correction_bias", zeros)).items():
            gate_up, down = ({k: v[number] for k, v in stacks[name].items()} for name in ("gate_up_proj", "down_proj"))
            inner = (token * (weight if experts.weighted_inputs else 1)) @ gate_up["kernel"] + gate_up.get("bias", 0)
            gate, up = np.split(inner.reshape(layer.groups, -1), 2, axis=-1)
            one = naive_hidden(gate, up, experts).reshape(-1) @ down["kernel"] + down.get("bias", 0)
            out[t] += one * (1 if experts.weighted_inputs else weight)
        if experts.shared_size:
            shared = state["shared_expert"]
            gate, up = np.split((token @ shared["gate_up_proj"]["kernel"]).reshape(layer.groups, -1), 2, axis=-1)
            out[t] += (gate / (1 + np.exp(-gate)) * up).reshape(-1) @ shared["down_proj"]["kernel"]
    return out


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 33)], ids=["a token", "three rows", "a prompt"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_layer_matches_loops(name: str, shape: tuple[int, int]):
    layer = sparse_mlp(settings(**SETTINGS[name]))
    x = np.random.default_rng(0).standard_normal((*shape, 48), np.float32)
    want = naive(layer, x.reshape(-1, 48)).reshape(x.shape)
    got = jax.jit(lambda layer, x: layer(x))(layer, jnp.asarray(x))
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * float(np.abs(want).max()))


def test_ties_and_weights_of_the_router():
    """Equal scores go to the lower number; a correction bias chooses, and does not weigh."""
    experts = settings(scoring="sigmoid", correction_bias=True, per_token=2)
    weights, numbers = route(jnp.zeros((1, 8)), experts, jnp.zeros(8).at[5].set(0.1))
    np.testing.assert_array_equal(numbers, [[5, 0]])
    np.testing.assert_array_equal(weights, [[0.5, 0.5]])


def test_all_tokens_may_choose_one_expert():
    """Blocks of one expert follow each other; experts without tokens have none."""
    x = jnp.arange(300.0)[:, None] * jnp.ones(4)
    numbers = jnp.full((300, 1), 6, jnp.int32)
    stacks = jnp.arange(8.0)[:, None]
    got = jax.jit(lambda x, numbers: by_expert(lambda x, own: x * own, x, numbers, stacks))(x, numbers)
    np.testing.assert_array_equal(got[:, 0], 6 * x)


def test_a_token_reads_only_its_experts():
    """NaN in the weights of all other experts does not reach it."""
    layer, run = sparse_mlp(settings(count=16)), jax.jit(lambda layer, x: (layer(x), layer.route(x[0])[1]))
    x = jnp.ones((1, 1, 48))
    want, numbers = run(layer, x)
    others = ~np.isin(np.arange(16), numbers)[:, None, None]
    for stack in (layer.experts.gate_up_proj, layer.experts.down_proj):
        stack.kernel.set_value(jnp.asarray(np.where(others, np.nan, stack.kernel[...])))
    np.testing.assert_array_equal(run(layer, x)[0], want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"per_token": 9}, "per_token=9 exceeds count=8 experts"),
        ({"groups": 3}, "count=8 experts cannot be split into groups=3 of equal size"),
        ({"groups": 4, "chosen_groups": 5}, "chosen_groups=5 exceeds groups=4"),
        ({"groups": 4, "chosen_groups": 1}, "per_token=3 exceeds the 2 experts of the chosen groups"),
        ({"scoring": "tanh"}, "scoring is 'tanh'; accepted: 'softmax', 'sigmoid' or 'softmax_of_chosen'"),
        ({"count": 0}, "count is 0; accepted: at least 1"),
    ],
)
def test_settings_that_are_not_accepted_are_named(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        settings(**changes)


def test_dense_layers_exist():
    with pytest.raises(ValueError, match=r"experts.dense_layers=\(2,\) must lie in 0..1"):
        tiny_config(experts=settings(dense_layers=(2,)))
    assert not settings(dense_layers=(1,)).in_layer(1)


@pytest.mark.parametrize("axes", [{"model": 2}, {"data": 2, "model": 2}, {"model": 4}], ids=str)
def test_a_split_model_gives_the_same_logits(axes: dict[str, int]):
    """Each device has whole columns of every expert, and the rows of its own prompts."""
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2}
    experts = settings(dense_layers=(0,), shared_size=24, bias=True)
    model = tiny_model(experts=experts, **sizes)
    ids = random_ids((2, 9))
    want = jax.jit(one_shot)(model, ids)
    mesh = meshes.make_mesh(axes)
    split = shard_model(model, mesh)
    mlp = split.layers[1].mlp
    assert isinstance(mlp, SparseMLP)
    kernel = mlp.experts.gate_up_proj.kernel[...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 48, 80 // axes["model"])}
    with jax.set_mesh(mesh):
        got = jax.jit(one_shot)(split, ids)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
    with pytest.raises(ValueError, match=r"experts.intermediate_size=42 cannot be split into 4 equal parts"):
        check_mesh(tiny_config(experts=settings(intermediate_size=42), **sizes), meshes.make_mesh({"model": 4}))


def test_latent_attention_is_split_by_heads():
    latent = Latent(query_rank=24, kv_rank=12, value_dim=8)
    model = tiny_model(latent=latent, rotary_dim=4, num_key_value_heads=4, attention_bias=True)
    ids = random_ids((2, 9))
    want = jax.jit(one_shot)(model, ids)
    mesh = meshes.make_mesh({"data": 2, "model": 4})
    split = shard_model(model, mesh)
    attention = split.layers[0].self_attn
    assert isinstance(attention, LatentAttention)
    assert {shard.data.shape for shard in attention.kv_b_proj.kernel[...].addressable_shards} == {(12, 20)}
    with jax.set_mesh(mesh):
        got = jax.jit(one_shot)(split, ids)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(jnp.abs(want).max()))
