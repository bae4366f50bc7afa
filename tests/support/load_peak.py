"""Loads a model on a mesh and prints, as JSON, the peak of this process's own memory over what the model keeps.

`python load_peak.py DIRECTORY AXES`. Pages of the mapped checkpoint are not the process's own, and are not counted.
"""

import json
import pathlib
import sys
import threading

import jax
from flax import nnx

from minikv_jax import meshes
from minikv_jax.models import hub


def own_bytes() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon")


def main() -> None:
    directory, axes = sys.argv[1:]
    mesh = meshes.make_mesh(meshes.parse(axes))
    jax.block_until_ready(meshes.place(jax.numpy.zeros(8), mesh))
    before, peak, ended = own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.001):
            peak = max(peak, own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model, _ = hub.load(directory, mesh=mesh)
    ended.set()
    watcher.join()
    leaves = jax.tree.leaves(nnx.state(model))
    kept = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    print(json.dumps({"over": peak - before - kept, "kept": kept, "largest": max(leaf.nbytes for leaf in leaves)}))


if __name__ == "__main__":
    main()
