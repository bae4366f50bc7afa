"""Runs kvpress's presses on a prompt, in the environment of `methods/test_kvpress.py`, which has kvpress.

Usage: kvpress_presses.py FILE.gguf REQUEST.json RESULT.npz. The request has `prompt`, `continuation` (token ids) and
`presses`, a list of [name, class, arguments, class around it or ""]. The result has, per name, `NAME/kept`, bool
[L, K, T], and `NAME/nll`, the mean negative log-likelihood of the continuation.
"""

import json
import pathlib
import sys
from typing import Any

import kvpress  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from transformers import AutoModelForCausalLM, DynamicCache


def held(full: torch.Tensor, kept: torch.Tensor) -> np.ndarray:
    """Tells which of the keys `full` [1, K, T, H] are among `kept` [1, K, n, H], as bool [K, T]."""
    found = np.zeros(full.shape[1:3], bool)
    for head, (keys, rest) in enumerate(zip(full[0].numpy(), kept[0].numpy(), strict=True)):
        token = {key.tobytes(): position for position, key in enumerate(keys)}
        assert len(token) == len(keys), "two keys of a head are equal"
        found[head, [token[key.tobytes()] for key in rest]] = True
    return found


@torch.inference_mode()
def run(model: Any, press: Any, prompt: list[int], continuation: list[int]) -> dict[str, np.ndarray]:
    kept: list[np.ndarray] = []
    compress = press.compress

    def recorded(module: Any, states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        result = compress(module, states, keys, values, attentions, kwargs)
        kept.append(held(keys, result[0]))
        return result

    press.compress = recorded
    cache = DynamicCache()
    ids, truth = torch.tensor([prompt]), torch.tensor([continuation])
    with press(model):
        first = model(ids, past_key_values=cache, logits_to_keep=1).logits
    positions = torch.arange(len(prompt), len(prompt) + len(continuation) - 1)[None]
    rest = model(truth[:, :-1], past_key_values=cache, position_ids=positions).logits
    logits = torch.cat([first, rest], dim=1)
    nll = torch.nn.functional.cross_entropy(logits[0].double(), truth[0])
    return {"kept": np.stack(kept), "nll": nll.numpy()}


def main(file: str, request: str, result: str) -> None:
    path = pathlib.Path(file)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    asked = json.loads(pathlib.Path(request).read_text())
    arrays = {}
    for name, kind, arguments, around in asked["presses"]:
        press = getattr(kvpress, kind)(**arguments)
        if around:
            press = getattr(kvpress, around)(press)
        made = run(model, press, asked["prompt"], asked["continuation"])
        arrays |= {f"{name}/{key}": value for key, value in made.items()}
    np.savez_compressed(result, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
