"""Tests tensors that hold all experts: cut into those of single experts, and dequantised from mxfp4."""

import dataclasses
import json
import pathlib
import weakref

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file
from support.family_cases import KINDS, write_kind
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from minikv_jax.models.experts import Stack
from minikv_jax.models.huggingface import load_safetensors
from minikv_jax.models.stacks import from_mxfp4, unstack
from minikv_jax.models.tensors import TensorSource


def source(tensors: dict[str, np.ndarray]) -> TensorSource:
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    return TensorSource("the file", shapes, lambda name, start, stop: tensors[name][start:stop], ())


@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_matrices(transposed: bool, alternating: bool):
    """Parts of 3 rows and 4 columns, of two experts."""
    parts = np.arange(2 * 2 * 3 * 4).reshape(2, 2, 3, 4)  # expert, part, row, column
    matrices = (parts.swapaxes(1, 2) if alternating else parts).reshape(2, 6, 4)
    whole = {"l.1.w": matrices.swapaxes(1, 2) if transposed else matrices, "other": np.arange(3)}
    rule = Stack(r"l\.(\d)\.w", (r"\1.{expert}.a", r"\1.{expert}.b"), transposed, alternating)
    found = unstack(source(whole), (rule,))
    assert found.shapes == {f"1.{e}.{part}": (3, 4) for e in (0, 1) for part in "ab"} | {"other": (3,)}
    for expert in (0, 1):
        for number, part in enumerate("ab"):
            np.testing.assert_array_equal(found.read_rows(f"1.{expert}.{part}", 1, 3), parts[expert, number, 1:])
    np.testing.assert_array_equal(found.read_rows("other", 0, 2), [0, 1])


def test_one_matrix_is_kept():
    """Pieces of a matrix are read once, and the next matrix takes the place of the last, whichever tensor it is in."""
    read: list[weakref.ref] = []

    def read_rows(name: str, start: int, stop: int) -> np.ndarray:
        array = np.zeros((stop - start, 4, 3))
        read.append(weakref.ref(array))
        return array

    stacks = (Stack(r"(\w)\.all", (r"\1.{expert}.a", r"\1.{expert}.b")),)
    found = unstack(TensorSource("the file", {"l.all": (2, 4, 3), "m.all": (2, 4, 3)}, read_rows, ()), stacks)
    for name in ("l.0.a", "l.0.b", "l.1.a", "m.0.a"):
        found.read_rows(name, 0, 1)
        found.read_rows(name, 1, 2)
    assert [array() is None for array in read] == [True, True, False]


def mxfp4(rng: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Random blocks of 32 numbers `[E, out, in]`: every code, and exponents around 1."""
    experts, rows, columns = shape
    blocks = rng.integers(0, 256, (experts, rows, columns // 32, 16), np.uint8)
    return {"blocks": blocks, "scales": rng.integers(121, 127, (experts, rows, columns // 32), np.uint8)}


def test_mxfp4_equals_transformers():
    parts = mxfp4(np.random.default_rng(0), (3, 4, 64))
    tensors = {f"w_{part}": values for part, values in parts.items()} | {"other_scales": np.zeros(2, np.uint8)}
    shapes, read = from_mxfp4({name: x.shape for name, x in tensors.items()}, lambda name, a, b: tensors[name][a:b])
    assert shapes == {"w": (3, 64, 4), "other_scales": (2,)}
    expected = convert_moe_packed_tensors(*(torch.from_numpy(parts[part]) for part in parts), dtype=torch.float32)
    np.testing.assert_array_equal(read("w", 1, 3), expected.numpy()[1:])
    np.testing.assert_array_equal(read("other_scales", 0, 1), [0])


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_gpt_oss_in_mxfp4(tmp_path: pathlib.Path):
    """Equals the same model with its experts dequantised, and other quantisations are refused by name."""
    kind = dataclasses.replace(KINDS["gpt-oss"], settings=KINDS["gpt-oss"].settings | {"hidden_size": 64})
    kind.settings.update({"intermediate_size": 32})
    write_kind(kind, tmp_path / "plain")
    tensors, rng = load_file(tmp_path / "plain" / "model.safetensors"), np.random.default_rng(0)
    packed = dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = packed.pop(name).shape
        parts = mxfp4(rng, (experts, outputs, inputs))
        packed |= {f"{name}_{part}": values for part, values in parts.items()}
        both = (torch.from_numpy(parts[part]) for part in ("blocks", "scales"))
        tensors[name] = np.ascontiguousarray(convert_moe_packed_tensors(*both, dtype=torch.float32).numpy())
    save_file(tensors, tmp_path / "plain" / "model.safetensors")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "packed").mkdir()
    save_file(packed, tmp_path / "packed" / "model.safetensors")
    written = tmp_path / "packed" / "config.json"
    written.write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    states = (nnx.state(load_safetensors(tmp_path / name)) for name in ("packed", "plain"))
    jax.tree.map(np.testing.assert_array_equal, *states)
    written.write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"quantization_config.quant_method is 'fp8'; accepted: 'mxfp4'"):
        load_safetensors(tmp_path / "packed")
