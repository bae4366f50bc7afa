"""Finds the fastest configuration of each tunable kernel on this machine's GPU and records the winners.

    python -m pallas_kernels.autotune [--op NAME ...] [--output FILE]

Every candidate that fits into shared memory is timed warm, on random data of one large shape per case, and printed.
The records of this device for the ops that ran are replaced in FILE (by default `tuned.json`, which the kernels read);
all others stay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from pallas_kernels import column_sums, flash_attention, hopper, tuning
from pallas_kernels.prefill_attention import HEAD_DIMS

_TIMED_RUNS = 15
_COMPILING_THREADS = 8


@dataclasses.dataclass(frozen=True)
class Problem:
    """The work that candidates are timed on in one case.

    Attributes:
      shape: description of the shape for the record.
      run: takes a config and returns the op as a function of `arguments`.
      arguments: arrays.
    """

    shape: str
    run: Callable[[Any], Callable[..., Any]]
    arguments: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Op:
    """A tunable op: its configs, their scratch, the cases with records of their own, and the problem of each case."""

    config: type[tuning.Config]
    scratch: Callable[..., dict[str, Any]]
    cases: tuple[dict[str, int], ...]
    problem: Callable[..., Problem]


_BATCH, _TOKENS, _HEADS, _KV_HEADS = 1, 8192, 32, 8
_HEAD_DIMS = tuple({"head_dim": head_dim} for head_dim in HEAD_DIMS)


def _normal(heads: int, head_dim: int) -> jax.Array:
    return jax.random.normal(jax.random.key(heads), (_BATCH, _TOKENS, heads, head_dim), jnp.bfloat16)


def _prefill_problem(head_dim: int) -> tuple[str, tuple[jax.Array, ...], dict[str, Any]]:
    q, k = _normal(_HEADS, head_dim), _normal(_KV_HEADS, head_dim)
    shape = f"B{_BATCH} S{_TOKENS} N{_HEADS} K{_KV_HEADS} H{head_dim} bfloat16"
    return shape, (q, k, jnp.full((_BATCH,), _TOKENS, jnp.int32)), {"scale": head_dim**-0.5, "window": None}


def _flash_attention(head_dim: int) -> Problem:
    shape, (q, k, lengths), options = _prefill_problem(head_dim)
    return Problem(
        shape,
        lambda config: lambda *arrays: flash_attention.flash_attention(*arrays, **options, config=config),
        (q, k, k, lengths),
    )


def _column_sums(head_dim: int) -> Problem:
    shape, (q, k, lengths), options = _prefill_problem(head_dim)
    lse = jnp.full((_BATCH, _HEADS, _TOKENS), 13.0, jnp.float32)
    return Problem(
        shape,
        lambda config: lambda *arrays: column_sums.column_sums(*arrays, **options, config=config),
        (q, k, lse, lengths),
    )


OPS = {
    "flash_attention": Op(flash_attention.Config, flash_attention.scratch, _HEAD_DIMS, _flash_attention),
    "column_sums": Op(column_sums.Config, column_sums.scratch, _HEAD_DIMS, _column_sums),
}


def tune(op: Op, case: dict[str, int], time_ms: Callable[..., float]) -> dict[str, Any]:
    """Times the candidates of a case and returns the winner's record, without op and device."""
    problem = op.problem(**case)
    fitting = [config for config in tuning.candidates(op.config) if hopper.fits(op.scratch(config, **case))]
    with ThreadPoolExecutor(_COMPILING_THREADS) as builders:
        built = builders.map(lambda config: jax.jit(problem.run(config)).lower(*problem.arguments).compile(), fitting)
        programs = list(built)
    tried = []
    for config, program in zip(fitting, programs, strict=True):
        tried.append({"config": dataclasses.asdict(config), "ms": time_ms(program, *problem.arguments)})
        print(f"  {config}: {tried[-1]['ms']:.4f} ms", flush=True)
    tried.sort(key=lambda row: row["ms"])
    return {"case": case, "shape": problem.shape, **tried[0], "tried": tried}


def kernel_ms(program: Callable[..., Any], *arguments: jax.Array) -> float:
    """Device time of the fastest warm call in milliseconds; other work can only lengthen a call."""
    jax.block_until_ready(program(*arguments))
    _, times = profiler.measure(program, iterations=_TIMED_RUNS)(*arguments)
    return min(float(ms) for ms in times or ())


def merge(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns `old` with the records of every op and device in `new` replaced by those of `new`."""
    replaced = {(record["op"], record["device"]) for record in new}
    kept = [record for record in old if (record["op"], record["device"]) not in replaced]
    return sorted(kept + new, key=lambda record: (record["device"], record["op"], sorted(record["case"].items())))


def main(arguments: list[str] | None = None) -> None:
    """Tunes the ops asked for, and writes the records after each."""
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.autotune", description="Records the fastest configs."
    )
    parser.add_argument("--op", action="append", choices=OPS, help="one to tune; may be given again (default: all)")
    parser.add_argument("--output", type=pathlib.Path, default=tuning.WINNERS, help="JSON file of records to update")
    options = parser.parse_args(arguments)
    reason = hopper.why_unavailable()
    if reason:
        parser.error(reason)
    device = {"device": jax.devices("gpu")[0].device_kind, "jax": jax.__version__}
    for name in options.op or OPS:
        records = []
        for case in OPS[name].cases:
            print(f"{name} {case}", flush=True)
            records.append({"op": name, **device, **tune(OPS[name], case, kernel_ms)})
        old = json.loads(options.output.read_text()) if options.output.exists() else []
        options.output.write_text(json.dumps(merge(old, records), indent=1) + "\n")


if __name__ == "__main__":
    main()
