"""Breaks a decode step or a prefill down by model part and kernel, from a trace of JAX's profiler.

A kernel belongs to the part whose named scope its instruction has in the compiled program. A kernel that a CUDA graph
launches is known by its name only, which is its instruction's name; kernels of libraries and our own are matched below.
"""

from __future__ import annotations

import collections
import gzip
import json
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from minikv_jax.bench import timing
from minikv_jax.bench.end_to_end import Case, Programs, at_step, bytes_read, prompts, time_prefill, time_stretch
from minikv_jax.bench.hlo import Instruction, Program

ATTENTION, COLLECTIVES, OTHER, UNKNOWN = "attention", "between devices", "other", "not attributed"

# Named scopes of the model's code, and the part of the table that each belongs to. The innermost known scope counts.
_PARTS = {
    **dict.fromkeys(("qkv_proj", "q_a_proj", "q_b_proj", "kv_a_proj", "kv_b_proj"), "qkv"),
    **dict.fromkeys(("decode_attention", "prefill_attention", "extend_attention"), ATTENTION),
    **dict.fromkeys(("gate_up_proj", "up_proj"), "gate_up"),
    **dict.fromkeys(("norm", "residual"), "norms and residuals"),
    **dict.fromkeys(("score", "compress", "evict"), "compression"),
    "o_proj": "o",
    "down_proj": "down",
    **{scope: scope for scope in ("append", "rope", "activation", "embed", "logits", "sampling")},
}

# Our own kernels, for launches by a CUDA graph: part of the kernel's name, and the part of the model.
_KERNELS = {
    "minikv::.*(decode|prefill|group_sums)_kernel": ATTENTION,
    "cudnn": ATTENTION,
    "minikv::.*append_kernel": "append",
    "minikv::.*(query_sums|join_splits|key_sums)_kernel": "compression",  # votes
    "minikv::.*quantize_kernel": "compression",
    "minikv::.*all_reduce|nccl": COLLECTIVES,
}
# Events of a CPU that hold others: control flow, and compilation units ("call.2 (store)", `outline.py`).
_HOLDS_OTHERS = re.compile(r"while|conditional|call\S* \(")
# Other kernels that a CUDA graph launches: the start of a custom call's target, and the names of its kernels. They are
# launched in the order of the program's calls.
_LIBRARIES = {"__cublas": "nvjet|gemm|gemv|cutlass", "mosaic_gpu": "mosaic_gpu"}


class Launch(NamedTuple):
    """One event of the trace: a kernel or copy on a GPU, an instruction on a CPU.

    Attributes:
      begin, us: microseconds.
      operation: the instruction that launched it, the loop around it or its CUDA graph; "" if unknown.
    """

    begin: float
    us: float
    kernel: str
    operation: str


def measure(values: dict[str, Any], of_prefill: bool, read_rate: float | None) -> dict[str, Any]:
    """Times and traces the decode steps of a case (`Case.steps`) or its prefill, and returns the results of a row.

    Args:
      values: fields of the `Case`.
      of_prefill: whether to trace the prefill.
      read_rate: bytes per second that the device reads; without it, there is no floor.
    """
    case = Case(**values)
    programs, params = Programs(case), nnx.state(case.load())
    begun = time_prefill(programs, params, case)
    first, steps, seconds, sizes, state = 0, 1, begun.seconds, {}, begun.state
    if not of_prefill:
        first, steps = next(iter(case.stretches().values()))
        state, seconds = time_stretch(programs, params, state, begun.lengths, first, steps)
        cache_bytes = bytes_read(state.cache, begun.lengths, range(first + 1, first + steps + 1))
        sizes = {**weight_bytes(params, case), ATTENTION: cache_bytes}
    row = {"of": "prefill" if of_prefill else "decode step", "first_step": first, "steps": steps}
    row |= {"us": 1e6 * seconds / steps, "clocks": timing.clocks()}
    if of_prefill:
        program, inputs = programs.prefill, prompts(programs, case)
        del begun, state  # two caches may not fit
        launches = record(lambda: program(params, None, *inputs))
    else:
        program, state = programs.decode, jax.block_until_ready(at_step(state, begun.lengths, first))
        launches = record(lambda: program(params, state, np.int32(first + steps)))
    of_part = collections.defaultdict[str, list[Launch]](list)
    for launch, part in zip(launches, attribute(launches, Program(program.as_text() or "")), strict=True):
        of_part[part].append(launch)
    return row | breakdown(of_part, steps, row["us"], sizes, read_rate)


def weight_bytes(params: Any, case: Case) -> dict[str, int]:
    """Bytes of the weights of each part with a matmul. All experts of a mixture count, though a step reads few."""
    head = "embed_tokens" if case.config().tie_word_embeddings else "lm_head"
    parts, sizes = _PARTS | {head: "logits"}, collections.Counter[str]()
    for path, leaf in nnx.to_flat_state(params):
        for name in map(str, path):
            if name == head or (name.endswith("_proj") and name in parts):
                sizes[parts[name]] += leaf.get_value().nbytes
    return dict(sizes)


def record(run: Callable[[], Any]) -> list[Launch]:
    """Runs a program under the profiler, and returns its launches in order.

    Raises:
      NotImplementedError: the profiler recorded none.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            jax.block_until_ready(run())
        found = list[Launch]()
        for file in pathlib.Path(directory).rglob("*.trace.json.gz"):
            with gzip.open(file) as content:
                found += read_launches(json.load(content)["traceEvents"])
    if not found:
        raise NotImplementedError(
            "the profiler recorded no kernels: a GPU's driver may allow it to administrators only"
        )
    return found


def read_launches(events: Sequence[Mapping[str, Any]]) -> list[Launch]:
    """What the first GPU launched, or without a GPU the CPU's operations, from the events of a trace."""
    names = {
        (event["name"], event["pid"], event.get("tid")): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
    }
    on_gpu, on_cpu = list[Launch](), list[Launch]()
    for event in (event for event in events if event.get("ph") == "X"):
        process = names.get(("process_name", event["pid"], None), "")
        thread = names.get(("thread_name", event["pid"], event["tid"]), "")
        operation = event.get("args", {}).get("hlo_op", "")
        launch = Launch(event["ts"], event["dur"], event["name"], operation)
        if process == "/device:GPU:0" and thread.startswith("Stream"):
            on_gpu.append(launch)
        elif operation == event["name"] and not _HOLDS_OTHERS.match(operation):
            on_cpu.append(launch)
    return sorted(on_gpu or on_cpu)


def breakdown(
    of_part: Mapping[str, Sequence[Launch]],
    steps: int,
    step_us: float,
    sizes: Mapping[str, int],
    read_rate: float | None,
) -> dict[str, Any]:
    """The results of a row, per step: each part and its kernels, the longest first, and the time without a kernel.

    Args:
      of_part: launches of each part, of all steps.
      steps: traced steps.
      step_us: microseconds of a step without the profiler. `share` is the fraction of it, or of the time with kernels
        if the profiler slowed them beyond a step.
      sizes: bytes that a step has to read, by part.
      read_rate: bytes per second.
    """
    everything = [launch for own in of_part.values() for launch in own]
    busy_us = _busy_us(everything) / steps

    def times(launches: Sequence[Launch]) -> dict[str, Any]:
        us = sum(launch.us for launch in launches)
        return {
            "launches": len(launches) / steps,
            "us": us / steps,
            "us_per_launch": us / len(launches),
            "share": us / steps / max(step_us, busy_us),
        }

    parts: list[dict[str, Any]] = []
    for part, own in of_part.items():
        kernels = collections.defaultdict[str, list[Launch]](list)
        for launch in own:
            kernels[launch.kernel].append(launch)
        lines: list[dict[str, Any]] = [{"kernel": name} | times(launches) for name, launches in kernels.items()]
        row: dict[str, Any] = {"part": part} | times(own)
        floor = _floor_us(sizes.get(part), read_rate)
        row |= {"bytes": sizes.get(part, 0), "fraction_of_floor": None if floor is None else floor / row["us"]}
        parts.append(row | {"kernels": sorted(lines, key=lambda line: -line["us"])})
    floor = _floor_us(sum(sizes.values()), read_rate)
    return {
        "launches": len(everything) / steps,
        "idle_us": max(step_us - busy_us, 0.0),
        "bytes": sum(sizes.values()),
        "floor_us": floor,
        "times_floor": None if floor is None else step_us / floor,
        "parts": sorted(parts, key=lambda row: (row["part"] in (OTHER, UNKNOWN), -row["us"])),
    }


def _floor_us(size: int | None, read_rate: float | None) -> float | None:
    """Microseconds to read so many bytes; None for none."""
    return 1e6 * size / read_rate if size and read_rate else None


def _busy_us(launches: Iterable[Launch]) -> float:
    """Microseconds in which at least one kernel runs."""
    busy, end = 0.0, 0.0
    for launch in sorted(launches):
        busy += max(launch.begin + launch.us - max(launch.begin, end), 0.0)
        end = max(end, launch.begin + launch.us)
    return busy


def table(row: Mapping[str, Any]) -> str:
    """A row as a table. Kernels of less than 1% of the step are in the sum of their part only."""
    sizes = f"batch {row['batch']} prompt {row['prompt_len']:,} + {row['max_new_tokens']:,}"
    if "error" in row:
        return f"{row['method']} {sizes}: {row['error']}"
    floor = "" if row["times_floor"] is None else f", {row['times_floor']:.2f}x floor"
    where = (
        "" if row["of"] == "prefill" else f" (mean of {row['first_step']} to {row['first_step'] + row['steps'] - 1})"
    )
    lines = [
        f"{row['method']} {sizes}: {row['of']}{where}, {row['us']:,.1f} us{floor}, {row['launches']:.1f} launches",
        f"{'':44}{'launches':>9}{'us':>11}{'us/launch':>11}{'MB':>10}{'floor':>7}{'share':>7}",
    ]
    for part in row["parts"]:
        lines.append(_line(part["part"], part))
        lines += [
            _line("  " + _short(kernel["kernel"]), kernel) for kernel in part["kernels"] if kernel["share"] >= 0.01
        ]
    return "\n".join([*lines, f"{'no kernel runs':53}{row['idle_us']:11.1f}{row['idle_us'] / row['us']:35.1%}"])


def _line(name: str, row: Mapping[str, Any]) -> str:
    size, floor = row.get("bytes"), row.get("fraction_of_floor")
    return (
        f"{name:44}{row['launches']:9.1f}{row['us']:11.1f}{row['us_per_launch']:11.2f}"
        f"{f'{size / 1e6:,.1f}' if size else '':>10}{'' if floor is None else f'{floor:.0%}':>7}{row['share']:7.1%}"
    )


def _short(kernel: str) -> str:
    """The name of a kernel without its C++ parameters."""
    return re.split(r"[<(]", re.sub(r"^void |\(anonymous namespace\)::", "", kernel))[0][:41]


def attribute(launches: Sequence[Launch], program: Program) -> list[str]:
    """The part of each launch."""
    parts = [_part(launch, program) for launch in launches]
    calls = list(program.custom_calls())
    for target, names in _LIBRARIES.items():
        own = [_part_of(x, program) for x in calls if x.target.startswith(target)]
        unknown = [i for i, x in enumerate(launches) if parts[i] == UNKNOWN and re.search(names, x.kernel)]
        if own and len(unknown) % len(own) == 0:
            for number, i in enumerate(unknown):
                parts[i] = own[number % len(own)]
    return parts


def _part(launch: Launch, program: Program) -> str:
    """The part of a launch by the names that it has."""
    loops = {"while", "conditional"}
    for name, holders in ((launch.operation, loops | {"call"}), (launch.kernel, loops)):
        instruction = program.find(name)
        if instruction is not None and instruction.opcode not in holders:
            return _part_of(instruction, program)
    return next((part for names, part in _KERNELS.items() if re.search(names, launch.kernel)), UNKNOWN)


def _part_of(instruction: Instruction, program: Program) -> str:
    """The part of an instruction by what it is, its own scopes, or the commonest of the operations that it fuses."""
    if re.match("all-|collective-|reduce-scatter", instruction.opcode) or instruction.target == "minikv_all_reduce":
        return COLLECTIVES
    if own := _scope(instruction.op_name):
        return own
    inside = collections.Counter(filter(None, (_scope(x.op_name) for x in program.inner(instruction))))
    return inside.most_common(1)[0][0] if inside else OTHER


def _scope(op_name: str) -> str | None:
    """The part that the innermost known scope belongs to."""
    return next((_PARTS[scope] for scope in reversed(re.split("[/;]", op_name)) if scope in _PARTS), None)
