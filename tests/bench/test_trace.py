"""Tests the breakdown of a step by model part and kernel."""

from typing import Any

import pytest
from flax import nnx
from support.bench import bench_case

from minikv_jax.bench import trace
from minikv_jax.bench.hlo import Program
from minikv_jax.bench.trace import ATTENTION, UNKNOWN, Launch

# Written as XLA writes a program for a GPU: matmuls by cuBLAS and by Triton, a fusion, a loop.
PROGRAM = """HloModule jit_start, is_scheduled=true

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %c.1 = f32[8]{0} custom-call(%x), custom_call_target="__cublas$lt$matmul", metadata={op_name="qkv_proj/dot"}
  %gemm_fusion_dot.7 = f32[8]{0} fusion(%c.1), kind=kCustom, calls=%f, metadata={op_name="jit(start)/o_proj/dot"}
  %c.2 = f32[8]{0} custom-call(%x), custom_call_target="__cublas$lt$matmul", metadata={op_name="down_proj/dot"}
  %loop_add_fusion = f32[8]{0} fusion(%c.2), kind=kLoop, calls=%f, metadata={op_name="jit(start)/mlp/residual/add"}
  %w.1 = f32[8]{0} while(%c.2), condition=%g, body=%f, metadata={op_name="jit(start)/append/while"}
  %call.1 = f32[8]{0} call(%x), to_apply=%f, metadata={op_name="jit(start)/jit(layer)/norm/call"}
  %all-reduce.3 = f32[8]{0} all-reduce(%c.2), to_apply=%g, metadata={op_name="jit(start)/down_proj/dot"}
  ROOT %copy.1 = f32[8]{0} copy(%loop_add_fusion)
}
"""


def launch(kernel: str, operation: str = "command_buffer_1", begin: float = 0.0, us: float = 1.0) -> Launch:
    return Launch(begin, us, kernel, operation)


@pytest.mark.parametrize(
    ("kernel", "operation", "part"),
    [
        ("gemm_fusion_dot_7", "command_buffer_1", "o"),
        ("loop_add_fusion", "command_buffer_1", "norms and residuals"),
        ("loop_add_fusion", "gemm_fusion_dot.7", "o"),  # shared by two instructions, one of which launched it
        ("copy_1", "call.1", trace.OTHER),
        ("call.1", "call.1", "norms and residuals"),  # an event of a CPU
        ("void minikv::decode_kernel<128, 2, 2, (minikv::Metadata)0>(minikv::Params)", "command_buffer_1", ATTENTION),
        ("void minikv::(anonymous namespace)::append_kernel<__half>(minikv::P)", "command_buffer_1", "append"),
        ("void minikv::key_sums_kernel<minikv::Tuned<128>, __half>(minikv::P)", "command_buffer_1", "compression"),
        ("cudnn_generated_fort_native_sdpa_sm90", "command_buffer_1", ATTENTION),
        ("MemcpyD2H", "w.1", UNKNOWN),
        ("all-reduce.3", "", trace.COLLECTIVES),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "command_buffer_1", trace.COLLECTIVES),
    ],
)
def test_a_launch_belongs_to_its_instructions_part(kernel: str, operation: str, part: str):
    assert trace.attribute([launch(kernel, operation)], Program(PROGRAM)) == [part]


def test_launches_of_the_first_gpu_are_read():
    def event(pid: int, tid: int, name: str, begin: float, **arguments: str) -> dict[str, Any]:
        return {"ph": "X", "pid": pid, "tid": tid, "ts": begin, "dur": 1.5, "name": name, "args": arguments}

    named = [(1, "/device:GPU:0"), (2, "/device:GPU:1"), (3, "/host:CPU")]
    threads = [(14, "Stream #14(Compute,MemcpyD2H)"), (15, "XLA Ops")]
    events = [
        *({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}} for pid, name in named),
        *(
            {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}
            for pid, _ in named
            for tid, name in threads
        ),
        event(1, 14, "MemcpyD2H", 3.0, hlo_op="while.23", hlo_module="jit_decode_until", context_id="$$1"),
        event(1, 14, "gemm_fusion_dot_19", 1.0, hlo_op="gemm_fusion_dot.19"),
        event(1, 15, "gemm_fusion_dot.19", 1.0, hlo_op="gemm_fusion_dot.19"),
        event(2, 14, "gemm_fusion_dot_19", 1.0),
        event(3, 14, "copy.3", 0.5, hlo_op="copy.3"),
        {"ph": "X", "pid": 1, "tid": 14, "ts": 2.0, "dur": 1.5, "name": "Memset 0"},
    ]
    assert trace.read_launches(events) == [
        Launch(1.0, 1.5, "gemm_fusion_dot_19", "gemm_fusion_dot.19"),
        Launch(2.0, 1.5, "Memset 0", ""),
        Launch(3.0, 1.5, "MemcpyD2H", "while.23"),
    ]
    assert trace.read_launches(events[-2:-1]) == [Launch(0.5, 1.5, "copy.3", "copy.3")]


def test_kernels_of_a_library_are_its_calls_in_order():
    names = ["nvjet_a", "gemm_fusion_dot_7", "nvjet_b", "nvjet_a", "Memset 0", "nvjet_b"]
    parts = trace.attribute([launch(name) for name in names], Program(PROGRAM))
    assert parts == ["qkv", "o", "down", "qkv", UNKNOWN, "down"]
    assert trace.attribute([launch("nvjet_a")], Program(PROGRAM)) == [UNKNOWN]  # not a whole round of calls


def test_breakdown_counts_per_step_and_compares_with_the_floor():
    attention = [launch("a", begin=0.0, us=30.0), launch("b", begin=20.0, us=20.0), launch("a", begin=100.0, us=30.0)]
    qkv = [launch("c", begin=60.0, us=20.0)]
    parts = {"qkv": qkv, ATTENTION: attention}
    row = trace.breakdown(parts, 2, 100.0, {"qkv": 500, ATTENTION: 2000}, read_rate=1e8)
    assert (row["launches"], row["bytes"], row["floor_us"], row["times_floor"]) == (2.0, 2500, 25.0, 4.0)
    assert row["idle_us"] == 100 - (40 + 20 + 30) / 2  # two kernels overlap
    first, second = row["parts"]
    assert {key: first[key] for key in ("part", "launches", "us", "share", "bytes", "fraction_of_floor")} == {
        "part": ATTENTION,
        "launches": 1.5,
        "us": 40.0,
        "share": 0.4,
        "bytes": 2000,
        "fraction_of_floor": 0.5,
    }
    assert [(kernel["kernel"], kernel["us"], kernel["us_per_launch"]) for kernel in first["kernels"]] == [
        ("a", 30.0, 30.0),
        ("b", 10.0, 20.0),
    ]
    assert (second["part"], second["fraction_of_floor"]) == ("qkv", 0.5)
    slowed = trace.breakdown(parts, 2, 10.0, {}, None)
    assert slowed["idle_us"] == 0.0
    assert slowed["times_floor"] is None
    assert sum(part["share"] for part in slowed["parts"]) == pytest.approx(50 / 45)


def test_weights_are_counted_by_part(shape: str):
    case = bench_case(shape, layers=1)
    config, sizes = case.config(), trace.weight_bytes(nnx.state(case.load()), case)
    layers, d, h = config.num_hidden_layers, config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    assert sizes == {
        "qkv": 4 * layers * d * (heads + 2 * kv_heads) * h,
        "o": 4 * layers * heads * h * d,
        "gate_up": 4 * layers * 2 * d * config.intermediate_size,
        "down": 4 * layers * config.intermediate_size * d,
        "logits": 4 * d * config.vocab_size,
    }


def test_a_decode_step_is_traced(shape: str):
    case = bench_case(shape, layers=1, prompt_len=64, max_new_tokens=8, steps=4)
    row = trace.measure(vars(case), False, None)
    parts = {part["part"]: part for part in row["parts"]}
    matmuls = {"qkv", "o", "gate_up", "down", "logits"}
    assert parts.keys() >= {ATTENTION, "append", "norms and residuals", "rope", "activation", "sampling", *matmuls}
    assert all(parts[name]["bytes"] for name in matmuls)
    assert (row["of"], row["first_step"], row["steps"]) == ("decode step", 2, 4)
    assert parts["logits"]["launches"] == 1  # per step
    assert 0 < parts[ATTENTION]["bytes"] < row["bytes"]
    assert UNKNOWN not in parts
    assert parts[trace.OTHER]["share"] < 0.5
    lines = trace.table(vars(case) | row).splitlines()
    assert lines[0].startswith("minikv batch 2 prompt 64 + 8: decode step (mean of 2 to 5), ")
    assert lines[-1].startswith("no kernel runs")
    assert {line[:44].strip() for line in lines} >= parts.keys()


def test_a_prefill_is_traced(shape: str):
    case = bench_case(shape, layers=1, prompt_len=64, max_new_tokens=8)
    row = trace.measure(vars(case), True, 1e9)
    assert {part["part"] for part in row["parts"]} >= {ATTENTION, "compression", "norms and residuals", "logits"}
    assert (row["of"], row["steps"], row["bytes"], row["times_floor"]) == ("prefill", 1, 0, None)
