"""Language model for EleutherAI's lm-evaluation-harness (package `lm_eval`), with a compressed cache and no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import jax
import numpy as np
from flax import nnx
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from minikv_jax import checks
from minikv_jax.generate import DEFAULT_METHOD, compile_ahead
from minikv_jax.integrations.scoring import Context, likelihoods
from minikv_jax.methods import contracts
from minikv_jax.methods.lookup import resolve
from minikv_jax.methods.method import Method
from minikv_jax.models import chat
from minikv_jax.models.decoder import Llama
from minikv_jax.programs import Programs, State
from minikv_jax.prompts import pad_prompts
from minikv_jax.sampling import Sampling

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

_CHUNK = 16  # tokens that are generated between two looks for a stop string
_MAX_NEW_TOKENS = 256  # the harness's default
_Request = tuple[tuple[str, str] | None, list[int], list[int]]


class CompressedLM(TemplateLM):
    """A model and a method as a language model of the harness, for `lm_eval.simple_evaluate(model=...)`.

    Attributes:
      method: compresses the contexts.
      batch_size: contexts, or continuations, at a time.
      cut: contexts so far that did not fit and lost their middle, as LongBench's authors cut theirs.
      not_finite: requests so far with logits that are NaN or infinite.
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: PreTrainedTokenizerBase | None,
        method: str | Method = DEFAULT_METHOD,
        *,
        batch_size: int = 1,
        context: int | None = None,
        stride: int = 512,
        implementation: str | None = None,
        seed: int = 0,
    ):
        """Makes the language model.

        Args:
          model: the model, on one device.
          tokenizer: its tokenizer.
          method: a `Method` or a name.
          batch_size: contexts, or continuations, at a time.
          context: maximum number of tokens of a context; None for what the model can take.
          stride: tokens of a text that `loglikelihood_rolling` scores from one compressed context.
          implementation: "xla", "pallas" or "cuda", for all ops; None for the fastest recorded one.
          seed: of the draws, for tasks that sample.

        Raises:
          ValueError: no tokenizer, a model on a mesh, a method that does not fit the model, or a number below 1.
        """
        super().__init__()
        if tokenizer is None:
            raise ValueError("the model has no tokenizer, and the harness's tasks are text")
        if model.mesh is not None:
            raise ValueError("the model is on a mesh: expected one device for the harness's tasks")
        checks.at_least(1, batch_size=batch_size, context=context, stride=stride)
        self.method = resolve(method)
        contracts.check(self.method, model.config)
        self.tokenizer: Any = tokenizer
        self.batch_size = batch_size
        self.cut = 0
        self.not_finite = 0
        self._model, self._implementation = model, implementation
        self._context, self._stride = context, stride
        self._programs: dict[tuple[tuple[int, ...], _Generation], Programs] = {}
        self._key = jax.random.key(seed)

    @property
    def max_length(self) -> int:
        """The model's positions."""
        return self._model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._ends[0]

    @property
    def _ends(self) -> list[int]:
        ends = [self.tokenizer.eos_token_id, *self._model.config.eos_token_ids]
        known = [token for token in dict.fromkeys(ends) if token is not None]
        if not known:
            raise ValueError(
                "neither the tokenizer nor the model has an end-of-sequence token, which the harness needs"
            )
        return known

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name in the harness's store of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Encodes a text; None adds the tokenizer's special tokens unless the text begins with the first of them."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Renders a conversation, ready for a reply or, without that prompt, with its last turn left open."""
        return chat.render(self.tokenizer, chat_history, open_last=not add_generation_prompt)

    def _fit(self, ids: Sequence[int], room: int) -> list[int]:
        """Cuts the middle out of a context of more tokens than `context` or `room`. A draft takes positions too."""
        room = min(room, self.method.longest_prompt(self.max_length))
        limit = room if self._context is None else min(self._context, room)
        if limit < 1:
            raise ValueError(f"the model has {self.max_length} positions, {1 - room} too few for a token of context")
        if len(ids) <= limit:
            return list(ids)
        self.cut += 1
        return [*ids[: limit // 2], *ids[len(ids) - (limit - limit // 2) :]]

    def _loglikelihood_tokens(self, requests: Sequence[_Request], **kwargs: Any) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], dict[int, list[int]]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            groups.setdefault(tuple(context), {})[number] = continuation
        contexts = []
        for tokens, continuations in groups.items():
            room = self.max_length + 1 - max(map(len, continuations.values()))  # the last token is only predicted
            contexts.append(Context(tuple(self._fit(tokens, room)), continuations))
        contexts.sort(key=lambda context: len(context.tokens), reverse=True)
        results: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(contexts), self.batch_size):
            batch = contexts[start : start + self.batch_size]
            for number, score in likelihoods(self._model, self.method, batch, self.batch_size, self._implementation):
                results[number] = score.total, score.greedy
                self.not_finite += not score.finite
                if (texts := requests[number][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", texts, results[number])
        return [results[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Computes log-likelihoods of whole texts, in the harness's windows.

        In a window, each `stride` tokens are scored from the compressed text before them. A method that loses nothing
        scores a window at once.
        """
        exact = self.method.keeps_all and self.method.quantizer is None
        window = min(self.max_length, self._context or self.max_length)
        stride = window if exact else self._stride
        parts: list[_Request] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, window, 1)
            for context, continuation in map(utils.make_disjoint_window, windows):
                for start in range(0, len(continuation), stride):
                    parts.append((None, context + continuation[:start], continuation[start : start + stride]))
                    owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[owner] += total
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers contexts, as `minikv_jax.generate` does, up to a stop string or an end-of-sequence token."""
        answers: dict[int, str] = {}
        alike: dict[str, list[int]] = {}
        arguments: list[Any] = [request.args for request in requests]
        for number, (_, kwargs) in enumerate(arguments):
            alike.setdefault(json.dumps(kwargs, sort_keys=True), []).append(number)
        for numbers in alike.values():
            how = _Generation.read(arguments[numbers[0]][1])
            room = self.max_length - how.max_new_tokens
            prompts = {number: self._fit(self._prompt(arguments[number][0]), room) for number in numbers}
            numbers.sort(key=lambda number: len(prompts[number]), reverse=True)
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                # The last one fills the batch up, because a smaller batch would need another compilation.
                filled = batch + batch[-1:] * (min(self.batch_size, len(numbers)) - len(batch))
                texts = self._answers([prompts[number] for number in filled], len(batch), how)
                for number, text in zip(batch, texts, strict=True):
                    answers[number] = text
                    self.cache_hook.add_partial("generate_until", arguments[number], text)
        return [answers[number] for number in range(len(requests))]

    def _prompt(self, text: str) -> list[int]:
        return self.tok_encode(text) or [self.prefix_token_id]

    def _answers(self, prompts: Sequence[list[int]], count: int, how: _Generation) -> list[str]:
        """Answers the first `count` of some prompts."""
        ids, lengths = pad_prompts(prompts, self._model.config.vocab_size, self.max_length)
        programs, params = self._compiled(ids.shape, int(lengths.max()), how), nnx.split(self._model)[1]
        ends = self._all_ends(how)
        self._key, key = jax.random.split(self._key)
        state = programs.prefill(params, None, ids, lengths, key)
        step = _CHUNK if how.until else how.max_new_tokens
        texts: list[str] = []
        for last in range(step, how.max_new_tokens + step, step):
            state = programs.decode(params, state, np.int32(min(last, how.max_new_tokens)))
            texts = [self._text(state, row, ends) for row in range(count)]
            ended = ~np.asarray(state.active)[:count]
            if all(end or how.stopped(text) for end, text in zip(ended, texts, strict=True)):
                break
        self.not_finite += int((~np.asarray(state.finite)[:count]).sum())
        return [how.before_stop(text) for text in texts]

    def _text(self, state: State, row: int, ends: Sequence[int]) -> str:
        ids = np.asarray(state.tokens)[row, : int(state.lengths[row])].tolist()
        return str(self.tokenizer.decode([i for i in ids if i not in ends], skip_special_tokens=True))

    def _all_ends(self, how: _Generation) -> list[int]:
        """The end-of-sequence tokens, and stop strings that are special tokens, which a text does not show."""
        special = [stop for stop in how.until if stop in self.tokenizer.all_special_tokens]
        return [*self._ends, *self.tokenizer.convert_tokens_to_ids(special)]

    def _compiled(self, shape: tuple[int, ...], longest: int, how: _Generation) -> Programs:
        """Compiles the programs for prompts of a padded shape, once."""
        if (shape, how) not in self._programs:
            self._programs[shape, how] = compile_ahead(
                self._model,
                shape[0],
                longest,
                method=self.method,
                max_new_tokens=how.max_new_tokens,
                sampling=how.sampling,
                eos_token_ids=self._all_ends(how),
                implementation=self._implementation,
            )
        return self._programs[shape, how]


class _Generation(NamedTuple):
    """How a task wants text to be generated."""

    max_new_tokens: int
    until: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def read(cls, kwargs: Mapping[str, Any]) -> Self:
        """Reads a task's generation_kwargs. Raises ValueError naming one that is not known."""
        values: dict[str, Any] = dict(normalize_gen_kwargs(dict(kwargs), _MAX_NEW_TOKENS))
        until = tuple(text for text in values.pop("until") if text)
        max_new_tokens = checks.integer("max_gen_toks", values.pop("max_gen_toks"), 1)
        samples = values.pop("do_sample")
        if values.pop("num_beams", 1) != 1:
            raise ValueError(f"generation_kwargs: num_beams={kwargs['num_beams']}; accepted: 1")
        filters = {name: values.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in values}
        if values:
            raise ValueError(
                f"generation_kwargs: {', '.join(values)}; accepted: until, max_gen_toks, do_sample, temperature, "
                "top_k, top_p, min_p"
            )
        return cls(max_new_tokens, until, Sampling(**filters) if samples else Sampling())

    def stopped(self, text: str) -> bool:
        """Whether a text holds a stop string."""
        return any(stop in text for stop in self.until)

    def before_stop(self, text: str) -> str:
        """The text before its first stop string."""
        return text[: min([text.find(stop) for stop in self.until if stop in text], default=len(text))]
