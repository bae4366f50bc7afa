"""External baseline: `generate` of Hugging Face transformers in torch, with random or real weights.

Attention is scaled_dot_product_attention. `huggingface-dynamic` grows its cache at every step. `huggingface-static`
allocates it at once, and `generate` then compiles the decode step with torch.compile.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import statistics
import time
from typing import TYPE_CHECKING, Any

from minikv_jax.bench.end_to_end import Case
from minikv_jax.bench.random_models import SHAPES
from minikv_jax.cache import memory
from minikv_jax.methods import lookup

if TYPE_CHECKING:
    import torch

METHODS = {"huggingface-dynamic": None, "huggingface-static": "static"}  # with `cache_implementation` of `generate`
_WARM_RUNS = 2


def measure(case: Case) -> dict[str, Any]:
    """Measures a row like `end_to_end.measure`. Times are warm medians; decode steps are a difference of two lengths.

    Times only the case's first stretch, after a prompt as long as the sequence is when the stretch begins.
    `prefill_s` is the time to the first token.

    Raises:
      NotImplementedError: torch is not installed.
    """
    try:
        import torch  # optional
    except ImportError as error:
        raise NotImplementedError(f"{case.method}: torch is not installed") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = _model(case, device)

    def seconds(prompt: int, new: int) -> tuple[float, list[float]]:
        """Seconds of the first call of `generate`, and of the calls after it."""
        ids = torch.randint(0, model.config.vocab_size, (case.batch, prompt), device=device)
        times = []
        for _ in range(_WARM_RUNS + 1):
            begin = time.perf_counter()
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                cache_implementation=METHODS[case.method],
            )
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return times[0], times[1:]

    cold, first = seconds(case.prompt_len, 1)
    name, (start, steps) = next(iter(case.stretches().items()))
    prompt = case.prompt_len + start
    _, one = seconds(prompt, 1)
    again, more = seconds(prompt, 1 + steps)
    ms = 1e3 * (statistics.median(more) - statistics.median(one)) / steps
    read = sum(_full_bytes(case, prompt + step) for step in range(1, steps + 1)) // steps
    weights = memory.weight_bytes(case.config(), case.dtype)
    stretch = {"first_step": start, "steps": steps, "ms_per_step": ms, "cache_bytes_read": read}
    stretch["device_bytes_read"] = weights + read
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "compile_s": {"first_calls": cold - min(first) + again - min(more)},
        "prefill_s": statistics.median(first),
        "time_to_first_token_s": statistics.median(first),
        "decode": {name: stretch},
        "decode_ms": ms,
        "decode_tokens_per_s": 1e3 * case.batch / ms,
        "weight_bytes": weights,
        "cache_bytes": _full_bytes(case, case.prompt_len + case.max_new_tokens),
        "predicted_bytes": None,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
    }


def _model(case: Case, device: str) -> Any:
    import torch  # optional
    from transformers import AutoConfig, AutoModelForCausalLM  # with torch: optional

    dtype: torch.dtype = getattr(torch, case.dtype)
    if case.model is not None:
        real: Any = AutoModelForCausalLM.from_pretrained(
            case.model, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False, use_safetensors=True
        )
        return real.to(device)
    named = SHAPES / f"{case.shape}.json"
    path = named if named.is_file() else pathlib.Path(case.shape or "")
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config.max_position_embeddings = case.config().max_position_embeddings
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    return model.eval()


def _full_bytes(case: Case, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens per row in the model's dtype."""
    sizes = {"prompt_length": tokens - 1, "max_new_tokens": 1, "batch": case.batch, "dtype": case.dtype}
    return memory.report(case.config(), lookup.get("full"), **sizes).full_bytes
