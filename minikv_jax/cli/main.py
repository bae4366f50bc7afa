"""The `minikv` command. Results go to stdout, the rest to stderr; a user's error is one line and exit code 2.

What needs JAX is imported inside the commands, so that `minikv --help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import logging
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from minikv_jax.checks import at_least
from minikv_jax.cli import prompt
from minikv_jax.cli.calibrate import add_calibrate
from minikv_jax.cli.evaluate import add_evaluate, add_sweep
from minikv_jax.cli.inspect import add_inspect
from minikv_jax.cli.shared import Parser, key_value, output_file, seed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from minikv_jax.cache.state import KVCache
    from minikv_jax.methods.config import CacheConfig
    from minikv_jax.models.decoder import Llama
    from minikv_jax.sampling import Sampling

DTYPES = ("float32", "bfloat16", "float16")
_SUITES = {
    "kernels": "the attention and quantisation kernels",
    "generate": "prefill, decode and memory of whole models, beside the hardware's floor",
    "figures": "pictures of what `generate` measured",
}
_REPORTED_PACKAGES = ("jax", "jaxlib", "flax", "transformers")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _shown_log() if "--verbose" in argv else contextlib.nullcontext():
            if argv[:1] == ["bench"] and argv[1:2] and argv[1] in _SUITES:
                return importlib.import_module(f"minikv_jax.bench.{argv[1]}").main(argv[2:]) or 0
            arguments = _parser().parse_args(argv)
            return arguments.run(arguments)
    except (ValueError, NotImplementedError, OSError) as error:
        if "--verbose" in argv:
            raise
        print(f"minikv: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """Sends the library's messages to stderr, each of them once: every layer chooses the same implementations."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        known = record.getMessage() in seen
        seen.add(record.getMessage())
        return not known

    logger, handler = logging.getLogger("minikv_jax"), logging.StreamHandler()
    handler.addFilter(is_new)
    handlers, propagates, level = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = handlers, propagates
        logger.setLevel(level)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="minikv", description="Text generation with a compressed KV cache.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="generate text, and report what the cache saved"))
    _add_memory(commands.add_parser("memory", help="bytes of a cache, from the model's config alone"))
    methods = commands.add_parser("methods", help="list the compression methods and their fields")
    methods.set_defaults(run=_methods)
    add_evaluate(commands.add_parser("evaluate", help="what methods cost in quality"))
    add_sweep(commands.add_parser("sweep", help="the same over a grid of methods and fields, with figures"))
    add_inspect(commands.add_parser("inspect", help="what methods keep of one prompt, layer by layer, with figures"))
    add_calibrate(commands.add_parser("calibrate", help="learn ranges and rotations for a method that quantises"))
    bench = commands.add_parser("bench", help="measure this machine")
    suites = bench.add_subparsers(required=True, metavar="SUITE")
    for name, text in _SUITES.items():
        suites.add_parser(name, help=text)  # reads its own options: see `main`
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_generate)
    parser.add_argument("--model", required=True, help="a directory, a .gguf file, a hub id, or smollm2-135m-instruct")
    source = parser.add_mutually_exclusive_group(required=True)
    prompt.add_sources(source)
    source.add_argument("--chat", action="store_true", help="a conversation: one message per line of stdin")
    _add_method(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    parser.add_argument("--top-k", type=int, metavar="N", help="draw from the N most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the most likely tokens that sum up to P")
    parser.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest one")
    parser.add_argument("--seed", type=seed, default=0, help="of the draws; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    parser.add_argument("--implementation", metavar="NAME", help="xla, pallas or cuda; default: the fastest measured")
    prompt.add_template(parser)
    parser.add_argument("--json", type=output_file, metavar="OUT", help="also write the result as JSON")
    parser.add_argument(
        "--verbose", action="store_true", help="name the implementation of each op; show the traceback of an error"
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_memory)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="a directory, a .gguf file, a hub id, or smollm2-135m-instruct")
    source.add_argument("--config", type=pathlib.Path, metavar="FILE", help="a Hugging Face config.json")
    _add_method(parser)
    parser.add_argument("--prompt-len", "--prompt", type=int, required=True, metavar="N", help="prompt tokens")
    parser.add_argument("--max-new-tokens", "--new", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows; default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--json", type=output_file, metavar="OUT", help="also write the result as JSON")
    parser.add_argument("--verbose", action="store_true", help="show the traceback of an error")


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--method",
        default="minikv",
        metavar="NAME[:KEY=VALUE,...]",
        help="see `minikv methods`; default: %(default)s",
    )
    parser.add_argument(
        "--set", type=key_value, action="append", default=[], metavar="KEY=VALUE", help="change a field of the method"
    )
    parser.add_argument(
        "--plugin", type=pathlib.Path, action="append", default=[], metavar="FILE", help="a Python file with schemes"
    )


def _method(arguments: argparse.Namespace) -> CacheConfig:
    from minikv_jax.methods import lookup as presets
    from minikv_jax.methods.base import load_plugin

    for file in arguments.plugin:
        load_plugin(file)
    return presets.parse(arguments.method, arguments.set)


# generate -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Turn:
    """One reply, with what it took. `compile_s` is the time to trace and compile, or to fetch the compiled programs."""

    prompt_tokens: int
    tokens: list[int]
    text: str
    cache: KVCache
    compile_s: float
    prefill_s: float
    decode_s: float

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens only, by the seconds of the decode loop."""
        return len(self.tokens) / self.decode_s


@dataclasses.dataclass(frozen=True)
class _Session:
    """A loaded model and the options that hold for every turn."""

    model: Llama
    tokenizer: PreTrainedTokenizerBase | None
    method: CacheConfig
    sampling: Sampling
    max_new_tokens: int
    seed: int
    implementation: str | None

    def turn(self, ids: list[int], number: int = 0, cache: KVCache | None = None) -> _Turn:
        """Generates one reply to `ids` and prints it as it comes; `cache` holds what came before and is used up."""
        import jax

        from minikv_jax.generate import stream

        begin = time.perf_counter()
        results = stream(
            self.model,
            [ids],
            cache=self.method if cache is None else cache,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            key=jax.random.fold_in(jax.random.key(self.seed), number),
            implementation=self.implementation,
        )
        tokens, text = [], ""
        seconds = [time.perf_counter() - begin]  # of compiling, of the prefill, and of every chunk of tokens
        begin = time.perf_counter()
        for result in results:
            jax.block_until_ready(result)  # the cache too: the tokens of a prefill are ready before it is
            seconds.append(time.perf_counter() - begin)
            tokens = result.tokens[0, : int(result.lengths[0])].tolist()
            text = self._show(tokens, text)
            cache = result.cache
            begin = time.perf_counter()
        print(flush=True)
        assert cache is not None
        return _Turn(len(ids), tokens, text, cache, seconds[0], seconds[1], sum(seconds[2:]))

    def _show(self, tokens: list[int], shown: str) -> str:
        """Prints what `tokens` add to the text shown so far. An unfinished character or space at the end waits."""
        if self.tokenizer is None:
            text = " ".join(map(str, tokens))
        else:
            text = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).rstrip("\ufffd").strip()
        print(text[len(shown) :], end="", flush=True)
        return text


def _generate(arguments: argparse.Namespace) -> int:
    from minikv_jax.ops import dispatch as kernels
    from minikv_jax.sampling import Sampling

    method = _method(arguments)
    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, min_p=arguments.min_p
    )
    kernels.check_implementation(arguments.implementation)
    at_least(1, max_new_tokens=arguments.max_new_tokens)
    if arguments.chat and arguments.json:
        raise ValueError("--json holds one result: not with --chat")
    given = None if arguments.chat else prompt.read(arguments)
    model, tokenizer = _load(arguments, method)
    session = _Session(
        model, tokenizer, method, sampling, arguments.max_new_tokens, arguments.seed, arguments.implementation
    )
    if given is None:
        return _chat(session)
    turn = session.turn(prompt.encode(tokenizer, given, raw=arguments.no_chat_template))
    report = _report(arguments, session, turn)
    print()
    _print_report(report)
    _write_json(arguments.json, report)
    return 0


def _load(arguments: argparse.Namespace, method: CacheConfig) -> tuple[Llama, PreTrainedTokenizerBase | None]:
    """The model, once its config is known to suit the method."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import jax

    from minikv_jax.cache import memory
    from minikv_jax.models import hub

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(hub.cache_directory() / "compiled"))
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with _progress(f"loading {arguments.model}"):
        memory.check_model(hub.load_config(arguments.model), method)
        return hub.load(arguments.model, dtype=dtype)


def _chat(session: _Session) -> int:
    """Answers each line of stdin; the cache goes from turn to turn."""
    from minikv_jax.models import chat

    if session.tokenizer is None:
        raise ValueError("the model has no tokenizer: --chat needs one")
    cache, last_token = None, -1
    for number, line in enumerate(_messages()):
        if cache is None:
            ids = chat.first_turn(session.tokenizer, line)
        else:
            ids = chat.next_turn(session.tokenizer, line, last_token)
        turn = session.turn(ids, number, cache)
        cache, last_token = turn.cache, turn.tokens[-1]
        kept = cache.kept_tokens
        held = f"{_span([int(kept.min()), int(kept.max())])} of {int(cache.length[0])} tokens kept per layer"
        print(f"[{held}, {cache.nbytes:,} bytes]", file=sys.stderr)
    return 0


def _messages() -> Iterator[str]:
    """The lines of stdin that are not blank."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def _report(arguments: argparse.Namespace, session: _Session, turn: _Turn) -> dict[str, Any]:
    """The result of `minikv generate` as JSON values.

    `full_bytes` is what `--method full` allocates for the same padded prompt and number of new tokens.
    """
    from minikv_jax.cache import memory
    from minikv_jax.generate import bucket_length

    dtype = str(turn.cache.layers[0].tail_k.dtype)
    full_bytes = memory.report(
        session.model.config,
        session.method,
        prompt_length=bucket_length(turn.prompt_tokens, session.model.config.max_position_embeddings),
        max_new_tokens=session.max_new_tokens,
        dtype=dtype,
    ).full_bytes
    return {
        "model": arguments.model,
        "method": session.method.name,
        "settings": dict(arguments.set),
        "implementation": session.implementation,
        "dtype": dtype,
        "prompt_tokens": turn.prompt_tokens,
        "generated_tokens": len(turn.tokens),
        "tokens": turn.tokens,
        "text": turn.text,
        "cache": {
            "bytes": turn.cache.nbytes,
            "packed_bytes": turn.cache.packed_bytes,
            "full_bytes": full_bytes,
            "ratio": turn.cache.nbytes / full_bytes,
            "per_layer": turn.cache.kept_tokens[:, 0].tolist(),
        },
        "timing": {
            "compile_s": turn.compile_s,
            "prefill_s": turn.prefill_s,
            "decode_s": turn.decode_s,
            "decode_tokens_per_s": turn.decode_tokens_per_s,
        },
        "versions": {name: importlib.metadata.version(name) for name in _REPORTED_PACKAGES},
    }


def _print_report(report: dict[str, Any]) -> None:
    cache, timing = report["cache"], report["timing"]
    seen = report["prompt_tokens"] + report["generated_tokens"]
    _print_rows(
        [
            ("prompt tokens", f"{report['prompt_tokens']:,}"),
            ("generated tokens", f"{report['generated_tokens']:,}"),
            ("kept per layer", f"{_span(cache['per_layer'])} of {seen:,} tokens"),
            ("cache", f"{cache['bytes']:,} bytes ({report['method']}, {report['dtype']} tail)"),
            ("full cache", f"{cache['full_bytes']:,} bytes ({report['dtype']})"),
            ("saved", f"{1 - cache['ratio']:.1%}"),
            ("compile", f"{timing['compile_s']:.2f} s"),
            ("prefill", f"{timing['prefill_s']:.2f} s"),
            ("decode", f"{timing['decode_s']:.2f} s, {timing['decode_tokens_per_s']:.1f} generated tokens/s"),
        ]
    )


# memory, methods, bench -----------------------------------------------------------------------------------------------


def _memory(arguments: argparse.Namespace) -> int:
    from minikv_jax.cache import memory
    from minikv_jax.models import hub
    from minikv_jax.models.config import ModelConfig

    method = _method(arguments)
    source = arguments.model or str(arguments.config)
    model = ModelConfig.from_hf(arguments.config) if arguments.model is None else hub.load_config(arguments.model)
    report = memory.report(
        model,
        method,
        prompt_length=arguments.prompt_len,
        max_new_tokens=arguments.max_new_tokens,
        batch=arguments.batch,
        dtype=arguments.dtype,
    )
    weights = memory.weight_bytes(model, arguments.dtype)
    _print_rows(
        [
            ("packed", f"{report.packed_bytes:,} bytes ({report.packed_saved:.1%} below full)"),
            ("full-precision tail", f"{report.tail_bytes:,} bytes"),
            ("lengths, positions", f"{report.index_bytes:,} bytes"),
            ("allocated in all", f"{report.bytes:,} bytes ({report.saved:.1%} below full)"),
            ("full cache", f"{report.full_bytes:,} bytes ({arguments.dtype})"),
            ("kept per layer", f"{_span([layer.kept for layer in report.layers])} of {arguments.prompt_len:,} tokens"),
            ("bytes per layer", _span(report.layer_bytes)),
            (
                "a decode step reads",
                f"{weights:,} bytes of weights; the cache is {report.bytes / (weights + report.bytes):.0%} of its "
                f"bytes, a full one {report.full_bytes / (weights + report.full_bytes):.0%}",
            ),
            ("speed to gain", f"at most {report.step_saved(weights):.2f} x, where memory bounds the step"),
        ]
    )
    _write_json(
        arguments.json,
        {
            "model": source,
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
                {**layer._asdict(), "bytes": size}
                for layer, size in zip(report.layers, report.layer_bytes, strict=True)
            ],
        },
    )
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    del arguments
    from minikv_jax.methods import base as schemes
    from minikv_jax.methods import lookup as presets
    from minikv_jax.methods.config import CacheConfig

    defaults = _fields(CacheConfig())
    for preset in presets.names():
        config = presets.get(preset)
        changed = {name: value for name, value in _fields(config).items() if value != defaults.get(name)}
        print(f"{preset}\n    {config.citation}")
        if changed:
            print("    " + " ".join(f"{name}={value}" for name, value in changed.items()))
    print("\nFields and their defaults, for --set:")
    for name, value in defaults.items():
        print(f"    {name}={str(value).lower() if value is None else value}")
    for registry in (schemes.SCORERS, schemes.BUDGETS, schemes.QUANTIZERS):
        print(f"\nValues of {registry.kind}, and what --set can change besides:")
        for name in registry:
            print(" ".join(["   ", name, *(f"{key}={value}" for key, value in registry[name].options.items())]))
    return 0


def _fields(config: CacheConfig) -> dict[str, Any]:
    """A method's fields and options, its name and citation left out."""
    values = dataclasses.asdict(config) | dict(config.options)
    return {name: value for name, value in values.items() if name not in ("name", "citation", "options")}


# output ---------------------------------------------------------------------------------------------------------------


def _progress(message: str) -> AbstractContextManager[Any]:
    """A line on stderr while something lasts; nothing where stderr is no terminal."""
    from rich.console import Console

    return Console(stderr=True).status(message)


def _print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _write_json(path: pathlib.Path | None, values: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
