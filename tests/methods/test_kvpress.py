"""Tests methods against kvpress's presses at equal settings: kept tokens, and the likelihood of what follows.

kvpress needs an older transformers than this library. It is installed beside the library's cache, and runs in a process
of its own.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

import minikv_jax as mk
from minikv_jax.evaluation import Case, measure
from minikv_jax.evaluation.inspection import inspect
from minikv_jax.models import hub, packaged

PROMPT, NEW = 640, 64
KEPT = 319  # of 4 sinks, 252 tokens without a full partition after theirs, and 21 of each of LagKV's other partitions
RATIO = 0.5015  # kvpress keeps int(PROMPT * (1 - RATIO)) tokens
SCRIPT = pathlib.Path(__file__).parents[1] / "support" / "kvpress_presses.py"
TEXT = pathlib.Path(__file__).parents[2] / "examples" / "log.txt"
# torch comes from this environment. These shadow its transformers, and add what kvpress imports.
REQUIREMENTS = (
    *("kvpress==0.5.5", "transformers==5.2.0", "tokenizers==0.22.2", "huggingface_hub==1.33.0", "httpx==0.28.1"),
    *("httpcore", "typer-slim", "datasets==5.2.0", "dill", "multiprocess", "xxhash", "pandas==2.3.3", "pytz"),
    *("cachetools==5.5.2", "fire==0.6.0", "termcolor", "accelerate", "requests"),
)


class Pair(NamedTuple):
    """A press and the same method of this library.

    Attributes:
      press, arguments: kvpress's class, and its arguments besides the ratio.
      around: a class of kvpress that takes the press; none if empty.
      method: the method.
      alike: smallest mean Jaccard index of the kept tokens over layers and heads. Norms that differ by float32's
        rounding swap a few tokens at the cut.
      nll: largest relative difference of the likelihoods: that of two float32 implementations, if tokens are the same.
    """

    press: str
    method: mk.Method
    alike: float = 1.0
    nll: float = 1e-6
    arguments: tuple[tuple[str, int], ...] = ()
    around: str = ""


def snapkv(kernel: int) -> mk.Method:
    scorer = mk.SnapKV(observation_window=64, pooling="mean", pooling_kernel=kernel)
    return mk.Method(scorer=scorer, heavy=KEPT - 64, recent=64)


def criticalkv(kernel: int) -> mk.Method:
    """Their first stage is of half of the kept tokens, of which 64 are the newest; ours is of the heavy budget."""
    first = (KEPT // 2 - 64) / (KEPT - 64)
    scorer = mk.CriticalKV(observation_window=64, pooling="mean", pooling_kernel=kernel, first_stage=first + 1e-4)
    return mk.Method(scorer=scorer, heavy=KEPT - 64, recent=64)


PAIRS = {
    "snapkv": Pair("SnapKVPress", snapkv(5)),
    "snapkv, not pooled": Pair("SnapKVPress", snapkv(1), arguments=(("kernel_size", 1),)),
    "criticalkv": Pair("SnapKVPress", criticalkv(5), around="CriticalKVPress"),
    "tova": Pair("TOVAPress", mk.Method(scorer=mk.TOVA(), heavy=KEPT - 1, recent=1)),
    "knorm": Pair("KnormPress", mk.Method(scorer=mk.KNorm(), heavy=KEPT, recent=0), 0.999, 1e-4),
    "keydiff": Pair("KeyDiffPress", mk.Method(scorer=mk.KeyDiff(), heavy=KEPT, recent=0)),
    "lagkv": Pair("LagKVPress", mk.Method(scorer=mk.LagKV(), heavy=KEPT - 4, recent=0, sinks=4)),
    "expected-attention": Pair(
        "ExpectedAttentionPress", mk.Method(scorer=mk.ExpectedAttention(), heavy=KEPT - 4, recent=0, sinks=4)
    ),
    "streaming-llm": Pair("StreamingLLMPress", mk.Method(recent=KEPT - 4, sinks=4)),
}


def packages() -> pathlib.Path:
    """Installs kvpress and what it needs, once."""
    path = packaged.cache_directory() / REQUIREMENTS[0]
    if not path.is_dir():
        part = path.with_suffix(".part")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", part, *REQUIREMENTS]
        subprocess.run(pip, check=True)
        part.rename(path)
    return path


@functools.cache
def results() -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """What the library keeps and measures, and what kvpress does."""
    model, tokenizer = mk.load(hub.DEMO_MODEL, dtype="float32")
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT.read_text())[: PROMPT + NEW]
    assert len(ids) == PROMPT + NEW
    case = Case("the log", tuple(ids[:PROMPT]), tuple(ids[PROMPT:]))
    methods = {name: pair.method for name, pair in PAIRS.items()}
    kept = inspect(model, case.prompt, methods, 1)
    (measured,) = measure(model, [case], methods, NEW)
    return kept, measured, ask_kvpress(case)


def ask_kvpress(case: Case) -> dict[str, np.ndarray]:
    directory = packages().parent
    request, result = directory / "kvpress-request.json", directory / "kvpress-result.npz"
    presses = [
        [name, pair.press, {"compression_ratio": RATIO, **dict(pair.arguments)}, pair.around]
        for name, pair in PAIRS.items()
    ]
    asked = {"prompt": case.prompt, "continuation": case.continuation, "presses": presses}
    request.write_text(json.dumps(asked))
    file = packaged.cache_directory() / f"{hub.DEMO_MODEL}.gguf"
    environment = os.environ | {"PYTHONPATH": str(packages())}
    subprocess.run([sys.executable, SCRIPT, file, request, result], env=environment, check=True, capture_output=True)
    return dict(np.load(result))


@pytest.mark.campaign
@pytest.mark.parametrize("name", PAIRS)
def test_method_is_kvpress_s_press(name: str):
    kept, measured, theirs = results()
    ours, press = kept[name].kept, theirs[f"{name}/kept"]
    alike = (ours & press).sum(axis=-1) / (ours | press).sum(axis=-1)
    assert (ours.sum(axis=-1) == KEPT).all()
    assert (press.sum(axis=-1) == KEPT).all()
    print(f"{name}: alike {alike.mean():.5f}, NLL {measured[name].nll:.7f} and {float(theirs[f'{name}/nll']):.7f}")
    assert alike.mean() >= PAIRS[name].alike
    assert measured[name].nll == pytest.approx(float(theirs[f"{name}/nll"]), rel=PAIRS[name].nll)
