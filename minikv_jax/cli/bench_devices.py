"""`minikv bench devices`: data- and model-parallel generation on all devices of a machine, within a limit of time."""

from __future__ import annotations

import argparse
import dataclasses

from minikv_jax.bench import devices
from minikv_jax.bench.end_to_end import Case
from minikv_jax.cli import output, shared
from minikv_jax.ops import dispatch

_SHAPES, _SPLIT_SHAPES = ("llama2-7b", "llama-3.1-8b"), ("llama-3.1-70b",)
_BATCHES, _LONG_PROMPTS = (1, 16, 192), (32768, 131072)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    for flag, default, text in (
        ("--shape", _SHAPES, "shape measured on all meshes"),
        ("--split-shape", _SPLIT_SHAPES, "shape measured on the largest mesh of model alone"),
    ):
        parser.add_argument(
            flag, action="append", metavar="SHAPE", help=f"{text}; repeatable; default: {', '.join(default)}"
        )
    for flag, default, text in (
        ("--batch", _BATCHES, "rows, on each part of data"),
        ("--long-prompt", _LONG_PROMPTS, "prompt tokens at batch 1"),
    ):
        parser.add_argument(
            flag,
            action="append",
            type=shared.positive,
            metavar="N",
            help=f"{text}; repeatable; default: {', '.join(map(str, default))}",
        )
    shared.add_method(parser, default="minikv")
    shared.add_plugin(parser)
    for flag, default, text in (
        ("--prompt-len", 2048, "prompt tokens"),
        ("--max-new-tokens", 1024, "generated tokens"),
        ("--steps", 64, "decode steps to time, in the middle and at the end"),
        ("--compile-ahead", 16, "programs to compile at a time"),
        ("--limit", 520, "seconds that all of it may take"),
    ):
        parser.add_argument(
            flag, type=shared.positive, default=default, metavar="N", help=f"{text}; default: {default}"
        )
    parser.add_argument(
        "--before",
        action="append",
        default=[],
        metavar="COMMAND",
        help="a command that runs first, such as the build of the kernels; repeatable",
    )
    shared.add_dtype(parser, "bfloat16")
    shared.add_implementation(parser)
    parser.add_argument("--output", type=shared.output_file, metavar="FILE", help="JSON file to write")


def run(arguments: argparse.Namespace) -> int:
    """Prints a line per row and per step; the file of --output is complete after each step."""
    dispatch.check_implementation(arguments.implementation)
    chosen = arguments.shape or arguments.split_shape
    sizes = devices.Sizes(
        arguments.shape or ([] if chosen else _SHAPES),
        arguments.split_shape or ([] if chosen else _SPLIT_SHAPES),
        arguments.batch or _BATCHES,
        arguments.long_prompt or _LONG_PROMPTS,
    )
    like = Case(
        shape=(*sizes.shapes, *sizes.split_shapes)[0],
        method=arguments.method,
        batch=1,
        prompt_len=arguments.prompt_len,
        max_new_tokens=arguments.max_new_tokens,
        steps=arguments.steps,
        dtype=arguments.dtype,
        implementation=arguments.implementation,
        plugins=tuple(map(str, arguments.plugin)),
    )
    like.resolve_method()
    for shape in (*sizes.shapes, *sizes.split_shapes):  # reports errors before anything runs
        dataclasses.replace(like, shape=shape).config()
    bench = devices.Devices(arguments.command_line, sizes, like, arguments.limit)
    print(f"{bench.report['devices']} devices, at most {arguments.limit} s in all", flush=True)
    for step in bench.run(arguments.before, arguments.compile_ahead):
        print(f"{step['step']}: {step['outcome']} ({step['seconds']:.0f} of {step['limit_s']:.0f} s)", flush=True)
        output.write_json(arguments.output, bench.report, indent=1)
    return int(all("error" in row for row in bench.report["results"]))
