"""Tests the reader of compiled programs."""

import jax
import jax.numpy as jnp

from minikv_jax.bench.hlo import Program

TEXT = """HloModule jit_f, is_scheduled=true

%fused_add (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %add.1 = f32[8]{0} add(%p, %p), metadata={op_name="jit(f)/norm/add"}
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %call.2 = (f32[8]{0}, s8[0]{0}) custom-call(%state), custom_call_target="__cublas$gemm", metadata={op_name="in"}
  ROOT %tuple = (s32[], f32[8]{0}) tuple(%state, /*index=1*/%call.2)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loop_add_fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_add
  %call.1 = f32[8]{0} custom-call(%x), custom_call_target="before", metadata={op_name="jit(f)/o_proj/dot"}
  %while.1 = (s32[], f32[8]{0}) while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %call.3 = f32[8]{0} custom-call(%x), custom_call_target="after"
}
"""


def test_custom_calls_come_in_the_order_in_which_they_run():
    calls = list(Program(TEXT).custom_calls())
    assert [call.target for call in calls] == ["before", *["__cublas$gemm"] * 3, "after"]
    assert [call.op_name for call in calls] == ["jit(f)/o_proj/dot", "in", "in", "in", ""]


def test_an_instruction_is_found_by_its_kernels_name():
    program = Program(TEXT)
    fusion = program.find("loop_add_fusion_3")
    assert fusion is not None
    assert fusion == program.find("loop_add_fusion.3") == program.find("loop_add_fusion_3_1")
    assert (fusion.opcode, fusion.op_name) == ("fusion", "")
    assert [x.op_name for x in program.inner(fusion)] == ["", "jit(f)/norm/add"]
    assert program.find("nvjet_sm90") is None


def test_the_compilers_own_text_is_read():
    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        with jax.named_scope("rows"):
            return jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(x) @ x, x)

    program = Program(function.lower(jnp.ones((4, 4))).compile().as_text() or "")
    loops = [x for x in program if x.opcode == "while"]
    assert [(loop.trips, "/rows/" in loop.op_name) for loop in loops] == [(3, True)]
    assert {"sine", "dot"} <= {x.opcode for x in program} | {y.opcode for x in program for y in program.inner(x)}
