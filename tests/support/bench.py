"""Cases for the end-to-end benchmark."""

from typing import Any

from minikv_jax.bench.end_to_end import Case


def bench_case(shape: str, **changes: Any) -> Case:
    fields: dict[str, Any] = {"method": "minikv", "batch": 2, "prompt_len": 100, "max_new_tokens": 160, "steps": 8}
    fields |= {"dtype": "float32"} | changes
    return Case(shape=shape, **fields)
