"""Exports a whole generation as StableHLO, to run without this library: `python examples/export_stablehlo.py`.

The file holds prefill, compression and decoding for a batch of prompts of one length. The weights are arguments. In a
program that has only JAX, `jax.export.deserialize` reads it:

    program = jax.export.deserialize(bytearray(open("generate.bin", "rb").read()))
    stored = np.load("generate.npz")  # written beside it
    weights = [stored[f"arr_{i}"] for i in range(len(stored))]
    tokens, lengths = program.call(weights, ids, lengths)  # int32 [1, 64], right-padded, and [1]

Writing and reading it needs the package flatbuffers (`pip install minikv_jax[export]`).
"""

import argparse
import pathlib

import jax
import numpy as np
from flax import nnx

import minikv_jax
from minikv_jax.programs import Settings, run


def export(model: minikv_jax.Llama, method: str, *, rows: int, prompt_length: int, max_new_tokens: int):
    """Returns the exported program, and the list of weights that it takes first."""
    graph, params = nnx.split(model)
    weights, tree = jax.tree.flatten(params)
    settings = Settings(max_new_tokens, minikv_jax.Sampling(), model.config.eos_token_ids, "xla", False)

    def generate(weights, ids, lengths):
        params = jax.tree.unflatten(tree, weights)
        result = run(graph, settings, minikv_jax.lookup.get(method), params, None, ids, lengths, jax.random.key(0))
        return result.tokens, result.lengths

    ids, lengths = jax.ShapeDtypeStruct((rows, prompt_length), np.int32), jax.ShapeDtypeStruct((rows,), np.int32)
    return jax.export.export(jax.jit(generate), platforms=("cpu", "cuda"))(weights, ids, lengths), weights


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a directory, a .gguf file or a hub id")
    parser.add_argument("--method", default="minikv", choices=minikv_jax.lookup.names())
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("generate.bin"))
    arguments = parser.parse_args()
    model, _ = minikv_jax.load(arguments.model)
    sizes = {"rows": 1, "prompt_length": 64, "max_new_tokens": arguments.max_new_tokens}
    program, weights = export(model, arguments.method, **sizes)
    arguments.out.write_bytes(program.serialize())
    np.savez(arguments.out.with_suffix(".npz"), *map(np.asarray, weights))
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes for {', '.join(program.platforms)}")


if __name__ == "__main__":
    main()
