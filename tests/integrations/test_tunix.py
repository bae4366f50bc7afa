"""Tests the sampler against the methods and fields of tunix's protocol, which its released package does not have."""

import asyncio
import dataclasses
import inspect
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from support.model_directory import byte_tokenizer
from support.tiny import tiny_model

from minikv_jax.generate import generate
from minikv_jax.integrations.tunix import CompressedSampler
from minikv_jax.sampling import Sampling

ASYNC = (
    *("start", "stop", "pause", "resume", "get_mesh", "sample", "get_weight_sync_metadata", "bind_weight_sync"),
    *("pre_weight_sync", "weight_sync", "post_weight_sync", "abort_weight_sync", "get_transfer_status"),
    *("migrate_kv_cache", "get_load_info"),
)


@dataclasses.dataclass(kw_only=True)
class Params:
    max_tokens: int = 64
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    return_logprobs: bool = False
    beam_size: int | None = None


@dataclasses.dataclass(kw_only=True)
class Request:
    prompt: Any
    sampling_params: Params | None = None
    request_id: str = ""


@dataclasses.dataclass(kw_only=True)
class Weights:
    weights: Any
    policy_version: int


def sampler(**changes: Any) -> CompressedSampler:
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), head_dim=32, **changes)
    return CompressedSampler(model, tokenizer, "minikv")


async def ask(own: CompressedSampler, *requests: Request) -> list[Any]:
    await own.start()
    return await own.sample(list(requests))


def test_the_methods_of_the_protocol_are_there():
    assert all(inspect.iscoroutinefunction(getattr(CompressedSampler, name)) for name in ASYNC)
    assert callable(CompressedSampler.initialize)
    assert callable(CompressedSampler.get_target_state)


def test_answers_are_those_of_generate_in_the_order_of_the_requests():
    own, logprobs = sampler(), Params(max_tokens=5, temperature=0.7, seed=3, return_logprobs=True)
    tokenizer = byte_tokenizer()
    prompts = [tokenizer.encode("The tide went out"), [5, 6, 7]]
    greedy = Request(prompt="Name a city", sampling_params=Params(max_tokens=3, temperature=0), request_id="b")
    first, middle, last = asyncio.run(
        ask(
            own,
            Request(prompt="The tide went out", sampling_params=logprobs, request_id="a"),
            greedy,
            Request(prompt=np.array(prompts[1]), sampling_params=logprobs, request_id="c"),
        )
    )
    sampling, key = Sampling(temperature=0.7), jax.random.key(3)
    want = generate(
        own.model, prompts, method="minikv", max_new_tokens=5, sampling=sampling, key=key, log_probabilities=True
    )
    assert want.log_probabilities is not None
    for row, answer in enumerate((first, last)):
        length = int(want.lengths[row])
        np.testing.assert_array_equal(answer.token_ids, want.tokens[row, :length])
        np.testing.assert_array_equal(answer.logprobs, want.log_probabilities[row, :length])
        np.testing.assert_array_equal(answer.prompt_token_ids, prompts[row])
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    assert [answer.request_id for answer in (first, middle, last)] == ["a", "b", "c"]
    assert (middle.logprobs, len(middle.token_ids), middle.finish_reason) == (None, 3, "length")


def test_an_end_of_sequence_token_stops():
    own = sampler()
    params = Params(max_tokens=4, temperature=0)
    (free,) = asyncio.run(ask(own, Request(prompt=[9, 8, 7], sampling_params=params)))
    stopping = sampler(eos_token_ids=(int(free.token_ids[1]),))
    (answer,) = asyncio.run(ask(stopping, Request(prompt=[9, 8, 7], sampling_params=params)))
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) <= 2


def test_new_weights_are_in_use_after_a_sync():
    own, other = sampler(), tiny_model(seed=1, vocab_size=len(byte_tokenizer()), head_dim=32)
    request = Request(prompt=[1, 2, 3], sampling_params=Params(max_tokens=4, temperature=0))
    before = asyncio.run(ask(own, request))[0].token_ids
    asyncio.run(own.weight_sync(Weights(weights=nnx.state(other, nnx.Param), policy_version=7)))
    after = asyncio.run(ask(own, request))[0].token_ids
    want = generate(other, [[1, 2, 3]], method="minikv", max_new_tokens=4).tokens[0]
    np.testing.assert_array_equal(after, want)
    assert own.policy_version == 7
    assert not np.array_equal(before, after)
    with pytest.raises(ValueError, match="another structure"):
        asyncio.run(own.weight_sync(Weights(weights={}, policy_version=8)))


def test_what_is_not_supported_is_named():
    own = sampler()
    with pytest.raises(RuntimeError, match="not started"):
        asyncio.run(own.sample([Request(prompt=[1])]))
    with pytest.raises(ValueError, match="sampling_params: beam_size=4 is not supported"):
        asyncio.run(ask(own, Request(prompt=[1], sampling_params=Params(beam_size=4))))
    with pytest.raises(ValueError, match=r"prompt is .*; accepted: text or token ids"):
        asyncio.run(ask(own, Request(prompt={"role": "user"})))
    with pytest.raises(NotImplementedError, match="caches live as long as their batch"):
        asyncio.run(own.migrate_kv_cache("a", "b", []))
