"""`minikv generate`: generate text, and report what the cache saved."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from minikv_jax import meshes
from minikv_jax.cache import memory
from minikv_jax.cache.kv_cache import KVCache
from minikv_jax.checks import at_least
from minikv_jax.cli import devices, output, prompt, shared
from minikv_jax.generate import stream
from minikv_jax.methods.method import Method
from minikv_jax.models import chat
from minikv_jax.models.decoder import Llama
from minikv_jax.ops import dispatch
from minikv_jax.programs import GenerateResult
from minikv_jax.prompts import bucket_length
from minikv_jax.sampling import Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPORTED_PACKAGES = ("jax", "jaxlib", "flax", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the prompt, the method, sampling and output."""
    shared.add_run(parser)
    devices.add_mesh(parser)
    devices.add_processes(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    prompt.add_sources(source)
    source.add_argument("--chat", action="store_true", help="a conversation, with one message per line of stdin")
    prompt.add_template(parser)
    shared.add_method(parser, default="minikv")
    shared.add_settings(parser)
    shared.add_max_new_tokens(parser, 128)
    parser.add_argument("--temperature", type=shared.number, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=shared.integer, metavar="N", help="draw from the N most likely tokens")
    parser.add_argument(
        "--top-p", type=shared.number, metavar="P", help="draw from the most likely tokens that sum up to P"
    )
    parser.add_argument("--min-p", type=shared.number, metavar="P", help="drop tokens below P times the likeliest one")
    shared.add_seed(parser, "of the draws")
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the text and the report of one prompt, or holds a conversation."""
    devices.join(arguments)
    with devices.ending_together(arguments):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    method = shared.read_method(arguments)
    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, min_p=arguments.min_p
    )
    dispatch.check_implementation(arguments.implementation)
    at_least(1, max_new_tokens=arguments.max_new_tokens)
    if arguments.chat and arguments.json:
        raise ValueError("--json holds one result: not with --chat")
    if arguments.chat and arguments.coordinator:
        raise ValueError("--chat reads the terminal of one process: not with --coordinator")
    text_or_ids = None if arguments.chat else prompt.read(arguments)
    mesh = devices.read_mesh(arguments)
    if mesh is not None and (rows := mesh.shape[meshes.DATA]) > 1:
        print(f"minikv: one prompt on a mesh with data={rows}: it is run {rows} times", file=sys.stderr)
    model, tokenizer = shared.load_model(arguments, [method], mesh)
    session = Session(
        model=model,
        tokenizer=tokenizer,
        method=method,
        sampling=sampling,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        implementation=arguments.implementation,
    )
    if text_or_ids is None:
        return _chat(session)
    reply = session.reply(prompt.encode(tokenizer, text_or_ids, raw=arguments.no_chat_template))
    report = _report(arguments, session, reply)
    print()
    output.print_rows(_rows(report))
    output.write_json(arguments.json, report)
    _check_finite(reply)
    return 0


class Seconds(NamedTuple):
    """How long a reply took.

    Attributes:
      compilation: tracing and compiling the programs, or fetching them from the compilation cache.
      prefill: the program that runs the prompt.
      decoding: all chunks of generated tokens.
    """

    compilation: float
    prefill: float
    decoding: float


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply, the cache after it, and how long it took."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    cache: KVCache
    seconds: Seconds
    finite: bool


@dataclasses.dataclass(frozen=True)
class Session:
    """A loaded model and the options of every reply."""

    model: Llama
    tokenizer: PreTrainedTokenizerBase | None
    method: Method
    sampling: Sampling
    max_new_tokens: int
    seed: int
    implementation: str | None

    def reply(self, ids: list[int], turn: int = 0, cache: KVCache | None = None) -> Reply:
        """Generates a reply to `ids`, and prints it as it comes.

        Args:
          turn: number of earlier replies; each draws with another key.
          cache: holds the conversation so far. It is donated.
        """
        begin = time.perf_counter()
        rows = 1 if self.model.mesh is None else self.model.mesh.shape[meshes.DATA]
        results = stream(
            self.model,
            [ids] * rows,
            method=self.method if cache is None else None,
            cache=cache,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            key=jax.random.fold_in(jax.random.key(self.seed), turn),
            implementation=self.implementation,
        )
        compilation = time.perf_counter() - begin
        steps = _timed(results)
        result, prefill = next(steps)
        decoding, tokens, text = 0.0, [], ""
        for result, seconds in steps:
            decoding += seconds
            tokens = result.tokens[0, : int(result.lengths[0])].tolist()
            text = self._show(tokens, text)
        print(flush=True)
        return Reply(
            len(ids), tokens, text, result.cache, Seconds(compilation, prefill, decoding), bool(result.finite[0])
        )

    def _show(self, tokens: list[int], shown: str) -> str:
        """Prints the text of `tokens` beyond `shown`; returns all of it, without an incomplete last character."""
        if self.tokenizer is None:
            text = " ".join(map(str, tokens))
        else:
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd").strip()
        print(text[len(shown) :], end="", flush=True)
        return text


def _timed(results: Iterator[GenerateResult]) -> Iterator[tuple[GenerateResult, float]]:
    """Yields each result with the seconds until the device has finished it."""
    while True:
        begin = time.perf_counter()
        result = next(results, None)
        if result is None:
            return
        jax.block_until_ready(result)  # the cache too, which is ready later than a prefill's tokens
        yield result, time.perf_counter() - begin


def _chat(session: Session) -> int:
    """Answers each line of stdin; the cache goes from turn to turn."""
    if session.tokenizer is None:
        raise ValueError("the model has no tokenizer: --chat needs one")
    reply: Reply | None = None
    for turn, line in enumerate(_messages()):
        if reply is None:
            reply = session.reply(chat.first_turn(session.tokenizer, line))
        else:
            reply = session.reply(chat.next_turn(session.tokenizer, line, reply.tokens[-1]), turn, reply.cache)
        kept = meshes.to_host(reply.cache.kept_tokens)
        tokens = output.span([int(kept.min()), int(kept.max())])
        print(
            f"[{tokens} of {int(reply.cache.length[0])} tokens kept per layer, {reply.cache.nbytes:,} bytes]",
            file=sys.stderr,
        )
        _check_finite(reply)
    return 0


def _check_finite(reply: Reply) -> None:
    """Raises ValueError if tokens were drawn from logits that are no numbers."""
    if not reply.finite:
        raise ValueError("logits are NaN or infinite: the text means nothing from some token on")


def _messages() -> Iterator[str]:
    """Reads the lines of stdin that are not blank."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _report(arguments: argparse.Namespace, session: Session, reply: Reply) -> dict[str, Any]:
    """The result as JSON values.

    `full_bytes` is what `--method full` allocates for the same padded prompt and number of new tokens.
    """
    config, dtype, cache, seconds = session.model.config, session.model.dtype.name, reply.cache, reply.seconds
    full_bytes = memory.report(
        config,
        session.method,
        prompt_length=bucket_length(reply.prompt_tokens, config.max_position_embeddings),
        max_new_tokens=session.max_new_tokens,
        batch=cache.length.shape[0],
        dtype=dtype,
    ).full_bytes
    return {
        "model": arguments.model,
        "method": session.method.name,
        "settings": dict(arguments.set),
        "implementation": session.implementation,
        "dtype": dtype,
        "prompt_tokens": reply.prompt_tokens,
        "generated_tokens": len(reply.tokens),
        "tokens": reply.tokens,
        "text": reply.text,
        "finite_logits": reply.finite,
        "cache": {
            "bytes": cache.nbytes,
            "packed_bytes": cache.packed_bytes,
            "full_bytes": full_bytes,
            "ratio": cache.nbytes / full_bytes,
            "devices": 1 if session.model.mesh is None else session.model.mesh.size,
            "per_layer": meshes.to_host(cache.kept_tokens)[:, 0].tolist(),
        },
        "timing": {
            "compile_s": seconds.compilation,
            "prefill_s": seconds.prefill,
            "decode_s": seconds.decoding,
            "decode_tokens_per_s": len(reply.tokens) / seconds.decoding,
        },
        "versions": {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES},
    }


def _rows(report: dict[str, Any]) -> dict[str, str]:
    """The report's lines on the terminal."""
    cache, timing = report["cache"], report["timing"]
    seen = report["prompt_tokens"] + report["generated_tokens"]
    return {
        "prompt tokens": f"{report['prompt_tokens']:,}",
        "generated tokens": f"{report['generated_tokens']:,}",
        "kept per layer": f"{output.span(cache['per_layer'])} of {seen:,} tokens",
        "cache": f"{cache['bytes']:,} bytes ({report['method']}, {report['dtype']} tail)",
        "full cache": f"{cache['full_bytes']:,} bytes ({report['dtype']})",
        "saved": f"{1 - cache['ratio']:.1%}",
        "compile": f"{timing['compile_s']:.2f} s",
        "prefill": f"{timing['prefill_s']:.2f} s",
        "decode": f"{timing['decode_s']:.2f} s, {timing['decode_tokens_per_s']:.1f} generated tokens/s",
    }
