"""Sampler of RL rollouts with a compressed cache, by the protocol of tunix (`tunix.experimental.rollout.sampler`).

The protocol is one of methods and fields, so tunix itself is not imported. Pass its own `SamplingResponse` as
`response` to get answers of its type.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from minikv_jax import checks
from minikv_jax.generate import DEFAULT_METHOD, generate
from minikv_jax.methods import contracts
from minikv_jax.methods.lookup import resolve
from minikv_jax.methods.method import Method
from minikv_jax.models.decoder import Llama, check_model
from minikv_jax.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REFUSED = ("return_logits", "return_routed_experts", "beam_size")  # settings of a request that are not computed


@dataclasses.dataclass(kw_only=True)
class SamplingResponse:
    """An answer, with the fields of tunix's.

    Attributes:
      text: the generated text.
      prompt_token_ids, token_ids: int32 `[T]` and `[M]`, without padding.
      logprobs: float32 `[M]`, of the drawn tokens under the policy that drew them; None unless asked for.
      finish_reason: "stop" after an end-of-sequence token, else "length".
      request_id: that of the request.
    """

    text: str
    prompt_token_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray | None = None
    finish_reason: str = "stop"
    request_id: str = ""


@dataclasses.dataclass(kw_only=True)
class LoadInfo:
    """Requests that wait and run, and the share of the cache in use: caches live as long as their batch."""

    num_requests_waiting: int = 0
    num_requests_running: int = 0
    kv_cache_usage_perc: float = 0.0


class _Settings(NamedTuple):
    """Settings that the requests of a batch share."""

    max_tokens: int
    sampling: Sampling
    seed: int | None
    logprobs: bool


class CompressedSampler:
    """Samples completions in batches, with a cache compressed by `method`.

    Requests of equal settings form a batch. Log-probabilities are those of the policy that read the compressed cache,
    which is what an off-policy correction needs.

    Args:
      model: the policy. `weight_sync` replaces its weights in place.
      tokenizer: encodes text prompts and decodes completions; None if prompts are token ids, and texts stay empty.
      method: a `Method` or a name.
      response: makes an answer from the fields of `SamplingResponse`, such as tunix's class of that name.
      seed: seed of the requests that give none.

    Raises:
      ValueError: a method that does not fit the model.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: PreTrainedTokenizerBase | None = None,
        method: str | Method = DEFAULT_METHOD,
        *,
        response: Callable[..., Any] = SamplingResponse,
        seed: int = 0,
    ):
        check_model("CompressedSampler", model)
        self.model, self.tokenizer, self.method = model, tokenizer, resolve(method)
        contracts.check(self.method, model.config)
        self.policy_version = 0
        self._response, self._seeds = response, itertools.count(seed)
        self._started, self._device = False, asyncio.Lock()
        self._ready = asyncio.Event()
        self._waiting = self._running = 0

    def initialize(self) -> None:
        """Does nothing: programs are compiled when the first requests of their shape arrive."""

    async def start(self, **options: Any) -> None:
        """Accepts requests from now on."""
        del options
        self._started = True
        self._ready.set()

    async def stop(self, **options: Any) -> None:
        """Accepts no more requests, after those that run."""
        del options
        self._started = False
        async with self._device:
            self._ready.clear()

    async def pause(self, **options: Any) -> None:
        """Lets further requests wait."""
        del options
        self._ready.clear()

    async def resume(self, **options: Any) -> None:
        """Goes on after `pause`."""
        del options
        self._ready.set()

    async def get_mesh(self, **options: Any) -> Any:
        """Returns the mesh of the model, or None."""
        del options
        return self.model.mesh

    async def sample(self, sampling_requests: Any | Sequence[Any], **options: Any) -> list[Any]:
        """Generates a completion for each request.

        Args:
          sampling_requests: a request or several, with `prompt` (text, or token ids), `request_id` and
            `sampling_params`: `max_tokens`, `temperature`, `top_p`, `top_k`, `seed`, `return_logprobs`.
          options: not read.

        Returns:
          The answers, in the order of the requests.

        Raises:
          RuntimeError: the sampler is not started.
          ValueError: a prompt of another kind, or a setting that is not supported. Nothing has run then.
        """
        del options
        if not self._started:
            raise RuntimeError("the sampler is not started: await start() first")
        several = isinstance(sampling_requests, Sequence)
        requests = list(sampling_requests) if several else [sampling_requests]
        prompts = [self._tokens(request.prompt) for request in requests]
        settings = [_settings(request.sampling_params) for request in requests]
        self._waiting += len(requests)
        try:
            await self._ready.wait()
            await self._device.acquire()
        finally:
            self._waiting -= len(requests)
        try:
            self._running = len(requests)
            return await asyncio.to_thread(self._sample, requests, prompts, settings)
        finally:
            self._running = 0
            self._device.release()

    def _sample(self, requests: list[Any], prompts: list[list[int]], settings: list[_Settings]) -> list[Any]:
        answers: list[Any] = [None] * len(requests)
        for shared in dict.fromkeys(settings):
            rows = [row for row, own in enumerate(settings) if own == shared]
            key = jax.random.key(next(self._seeds) if shared.seed is None else shared.seed)
            result = generate(
                self.model,
                [prompts[row] for row in rows],
                method=self.method,
                max_new_tokens=shared.max_tokens,
                sampling=shared.sampling,
                key=key,
                log_probabilities=shared.logprobs,
            )
            tokens, lengths, logprobs = jax.device_get((result.tokens, result.lengths, result.log_probabilities))
            for number, row in enumerate(rows):
                drawn = tokens[number, : lengths[number]]
                answers[row] = self._response(
                    text="" if self.tokenizer is None else self.tokenizer.decode(drawn, skip_special_tokens=True),
                    prompt_token_ids=np.array(prompts[row], np.int32),
                    token_ids=drawn,
                    logprobs=None if logprobs is None else logprobs[number, : lengths[number]],
                    finish_reason="stop" if drawn.size and drawn[-1] in self.model.config.eos_token_ids else "length",
                    request_id=requests[row].request_id,
                )
        return answers

    def _tokens(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str) and self.tokenizer is not None:
            return list(self.tokenizer.encode(prompt))
        array = np.asarray(prompt)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            accepted = "token ids" if self.tokenizer is None else "text or token ids"
            raise ValueError(f"prompt is {checks.shown(prompt)}; accepted: {accepted}")
        return array.tolist()

    def get_target_state(self) -> Any:
        """Returns shapes, dtypes and placements of the weights, which `weight_sync` takes."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), nnx.state(self.model, nnx.Param)
        )

    async def get_weight_sync_metadata(self, **options: Any) -> Any:
        """Returns `get_target_state`."""
        del options
        return self.get_target_state()

    async def bind_weight_sync(self, sync_request: Any = None, **options: Any) -> None:
        """Does nothing: weights come with the request."""

    async def pre_weight_sync(self, sync_request: Any = None, **options: Any) -> None:
        """Does nothing: weights come with the request."""

    async def weight_sync(self, sync_request: Any = None, **options: Any) -> None:
        """Replaces the policy's weights by `sync_request.weights`, between two batches.

        Raises:
          ValueError: no weights, or weights of another structure, shape or dtype.
        """
        del options
        weights = getattr(sync_request, "weights", None)
        expected = self.get_target_state()
        if jax.tree.structure(weights) != jax.tree.structure(expected):
            raise ValueError("weight_sync: weights have another structure than get_target_state()")
        for old, new in zip(jax.tree.leaves(expected), jax.tree.leaves(weights), strict=True):
            if (old.shape, old.dtype) != (new.shape, new.dtype):
                raise ValueError(f"weight_sync: {new.dtype}{list(new.shape)}; expected {old.dtype}{list(old.shape)}")
        async with self._device:
            placed = jax.tree.map(
                lambda new, old: jax.device_put(new, old.sharding, may_alias=False), weights, expected
            )
            nnx.update(self.model, placed)
            self.policy_version = getattr(sync_request, "policy_version", self.policy_version + 1)

    async def post_weight_sync(self, sync_request: Any = None, **options: Any) -> None:
        """Does nothing: the new weights are in use already."""

    async def abort_weight_sync(self, sync_request: Any = None, **options: Any) -> None:
        """Does nothing: `weight_sync` replaces all weights or none."""

    async def get_transfer_status(self, req_id: Any, **options: Any) -> str:
        """Returns "done": transfers end with `weight_sync`."""
        del req_id, options
        return "done"

    async def migrate_kv_cache(
        self, source_server_id: str, target_server_id: str, token_ids: list[int], **options: Any
    ) -> bool:
        """Refuses: caches live as long as their batch."""
        del token_ids, options
        raise NotImplementedError(f"from {source_server_id} to {target_server_id}: caches live as long as their batch")

    async def get_load_info(self, **options: Any) -> LoadInfo:
        """Returns the numbers of requests that wait and run."""
        del options
        share = 1.0 if self._running else 0.0
        return LoadInfo(
            num_requests_waiting=self._waiting, num_requests_running=self._running, kv_cache_usage_perc=share
        )


def _settings(params: Any) -> _Settings:
    """Reads a request's settings; None stands for tunix's defaults."""
    read = lambda name, default: default if params is None else getattr(params, name, default)  # noqa: E731
    if asked := [name for name in _REFUSED if read(name, None)]:
        raise ValueError(f"sampling_params: {asked[0]}={read(asked[0], None)} is not supported")
    temperature = read("temperature", 1.0)
    filters = {} if temperature == 0 else {"top_k": read("top_k", None), "top_p": read("top_p", None)}
    sampling = Sampling(temperature=temperature, **filters)
    return _Settings(read("max_tokens", 64), sampling, read("seed", None), bool(read("return_logprobs", False)))
