"""Tests the model against transformers (torch, CPU, float32), module by module and as a whole."""

import pathlib
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.checkpoints import gguf_name
from support.tiny import random_ids

from minikv_jax.generate import generate
from minikv_jax.models import hub
from minikv_jax.models.decoder import Llama
from minikv_jax.models.huggingface import load_safetensors
from minikv_jax.models.rotary import rotary_tables
from minikv_jax.one_shot import one_shot
from minikv_jax.ops.prefill_attention import prefill_attention

T = 24
TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3.1": ("llama", {"rope_parameters": LLAMA31, "head_dim": 16}),
    "llama3.2 tied": ("llama", {"rope_parameters": LLAMA31, "tie_word_embeddings": True}),
    "llama linear, biased": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
    ),
    "smollm2": ("llama", {"num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 16}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3 tied": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 windows": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Llama]:
    """Makes a random transformers model, and loads the same checkpoint in this library."""
    model_type, changes = FAMILIES[request.param]
    config = transformers.AutoConfig.for_model(model_type, **TINY | changes)
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            # Large enough for sharp attention; norms and biases differ from their initial ones and zeros.
            values.copy_(torch.randn_like(values) * 0.25 + ("norm" in name))
    directory = tmp_path_factory.mktemp("parity") / "model"
    theirs.save_pretrained(directory)
    return theirs, load_safetensors(directory)


def assert_close(ours: jax.Array, theirs: torch.Tensor, roundings: int) -> None:
    """Checks equality within a number of float32 roundings of the largest value.

    Both sides round, in different orders. A sum of n <= 96 terms rounds n times on each side, which with random signs
    amounts to sqrt(n), about 10 per module. Errors add up over layers, and softmax and activation may amplify them.
    """
    expected = theirs.detach().numpy()
    bound = roundings * float(np.finfo(np.float32).eps) * float(np.max(np.abs(expected)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=bound)


def hidden_input() -> tuple[jax.Array, torch.Tensor]:
    x = np.random.default_rng(0).standard_normal((2, T, TINY["hidden_size"]), np.float32)
    return jnp.asarray(x), torch.from_numpy(x)


def test_embedder(pair: tuple[Any, Llama]):
    theirs, ours = pair
    ids = random_ids((2, T))
    expected = theirs.model.embed_tokens(torch.from_numpy(np.array(ids)))
    np.testing.assert_array_equal(ours.embed_tokens(ids), expected.detach().numpy())


def test_norms(pair: tuple[Any, Llama]):
    theirs, ours = pair
    mine, other = hidden_input()
    assert_close(ours.norm(mine), theirs.model.norm(other), 4)
    layer = theirs.model.layers[1]
    for name in ("input_layernorm", "post_attention_layernorm"):
        assert_close(getattr(ours.layers[1], name)(mine), getattr(layer, name)(other), 4)


def test_projections(pair: tuple[Any, Llama]):
    theirs, ours = pair
    mine, other = hidden_input()
    attention = theirs.model.layers[1].self_attn
    kv_heads = ours.config.num_key_value_heads
    apart = [getattr(attention, name)(other) for name in ("q_proj", "k_proj", "v_proj")]
    by_head = torch.cat([x.unflatten(-1, (kv_heads, -1)) for x in apart], dim=-1).flatten(-2)
    mine_attention: Any = ours.layers[1].self_attn
    assert_close(mine_attention.qkv_proj(mine), by_head, 32)


def test_query_and_key_norms(pair: tuple[Any, Llama]):
    theirs, ours = pair
    assert (ours.config.design.qk_norm is not None) == hasattr(theirs.model.layers[1].self_attn, "q_norm")
    x = np.random.default_rng(0).standard_normal((2, T, 4, ours.config.head_dim), np.float32)
    for name in ("q_norm", "k_norm"):
        module = getattr(ours.layers[1].self_attn, name)
        if module is not None:
            assert_close(
                module(jnp.asarray(x)), getattr(theirs.model.layers[1].self_attn, name)(torch.from_numpy(x)), 8
            )


def test_output_projection(pair: tuple[Any, Llama]):
    theirs, ours = pair
    width = ours.config.num_attention_heads * ours.config.head_dim
    x = np.random.default_rng(0).standard_normal((2, T, width), np.float32)
    assert_close(
        ours.layers[1].self_attn.o_proj(jnp.asarray(x)),
        theirs.model.layers[1].self_attn.o_proj(torch.from_numpy(x)),
        32,
    )


def test_mlp(pair: tuple[Any, Llama]):
    theirs, ours = pair
    mine, other = hidden_input()
    assert_close(ours.layers[1].mlp(mine), theirs.model.layers[1].mlp(other), 16)


def test_rotary_tables(pair: tuple[Any, Llama]):
    theirs, ours = pair
    positions = np.arange(64, dtype=np.int32)[None]
    expected = theirs.model.rotary_emb(torch.zeros(1), torch.from_numpy(positions))
    for mine, other in zip(rotary_tables(ours.config.rope(0), jnp.asarray(positions)), expected, strict=True):
        # An angle of up to 64 radians is rounded by up to 64 * eps / 2; both halves of their table are the same.
        assert_close(mine, other[..., : other.shape[-1] // 2], 32)


def test_layers(pair: tuple[Any, Llama]):
    theirs, ours = pair
    ids, lengths = random_ids((2, T)), jnp.full((2,), T, jnp.int32)
    with torch.no_grad():
        states = theirs.model(torch.from_numpy(np.array(ids)), output_hidden_states=True).hidden_states
    tables = rotary_tables(ours.config.rope(0), jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (2, T)))
    for index in range(2):  # transformers shows the last layer's output only after the final norm

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, index: int = index) -> jax.Array:
            return prefill_attention(q, k, v, lengths, window=ours.window(index))[0]

        run = jax.jit(lambda x, layer=ours.layers[index], attend=attend: layer(x, *tables, attend))
        assert_close(run(jnp.asarray(states[index].numpy())), states[index + 1], 32)


def test_whole(pair: tuple[Any, Llama]):
    theirs, ours = pair
    ids = random_ids((2, T))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.array(ids))).logits
    assert_close(jax.jit(lambda ids: one_shot(ours, ids))(ids), expected, 64)


PROMPTS = (
    "The capital of France is",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood, this "
    "truth is so well fixed in the minds of the surrounding families, that he is considered the rightful property of "
    "some one or other of their daughters.",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n\n"
    "print(fibonacci(12345))",
)


def transformers_smollm2(path: pathlib.Path) -> Any:
    """Makes transformers' Llama with the file's weights, read and reordered without the library's loader."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state: dict[str, torch.Tensor] = {}
    for name in model.state_dict():
        tensor = stored["token_embd.weight" if name == "lm_head.weight" else gguf_name(name)]
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        for letter, heads in (("q", 9), ("k", 3)):
            if f"{letter}_proj" in name:
                rows = [h * 64 + 2 * i + half for h in range(heads) for half in (0, 1) for i in range(32)]
                values = values[rows]
        state[name] = torch.from_numpy(np.array(values))
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffer is not part of the state
    return model.eval()


@pytest.fixture(scope="module")
def their_smollm2() -> Any:
    return transformers_smollm2(hub.demo_model_path())


@pytest.mark.slow
def test_smollm2_greedy_tokens_of_real_prompts(smollm2: tuple[Llama, Any], their_smollm2: Any):
    """A ragged batch in the compiled loop under `full` gives transformers' tokens for each prompt."""
    ours, tokenizer = smollm2
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    found = generate(ours, prompts, method="full", max_new_tokens=64, eos_token_ids=()).tokens
    for tokens, prompt in zip(np.asarray(found), prompts, strict=True):
        with torch.no_grad():
            expected = their_smollm2.generate(
                torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
            )
        np.testing.assert_array_equal(tokens, expected[0, len(prompt) :].numpy())


@pytest.mark.slow
def test_smollm2_logits_of_real_prompts(smollm2: tuple[Llama, Any], their_smollm2: Any):
    ours, tokenizer = smollm2
    theirs = their_smollm2
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    ids = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    found = jax.jit(one_shot)(ours, jnp.asarray(ids), lengths)
    for logits, prompt in zip(np.asarray(found), prompts, strict=True):
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt])).logits[0].numpy()
        # 30 layers of float32 in another order of summation: about 100 roundings of logits of up to 40.
        np.testing.assert_allclose(logits[: len(prompt)], expected, rtol=0, atol=5e-4)
