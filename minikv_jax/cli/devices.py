"""Options for several devices and several processes: --mesh, --coordinator, --num-processes and --process-id."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from minikv_jax import meshes
from minikv_jax.cli import lost_process, shared

_HEARTBEAT_SECONDS = 20  # a process that was lost is noticed within about twice as long


def add_mesh(options: argparse._ActionsContainer) -> None:
    """Adds --mesh."""
    options.add_argument(
        "--mesh",
        type=shared.argument(meshes.parse),
        metavar="AXIS=N[,AXIS=N]",
        help="devices: data=N splits the rows of a batch, model=N the heads; data=2,model=4 takes eight",
    )


def add_processes(options: argparse._ActionsContainer) -> None:
    """Adds the options of a run of several processes, each of which is started with its own --process-id."""
    options.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="the address of process 0, for a mesh over several processes; auto: as Slurm, Open MPI or a TPU pod says",
    )
    options.add_argument("--num-processes", type=shared.positive, metavar="N", help="processes of the run")
    options.add_argument("--process-id", type=shared.integer, metavar="I", help="this process, 0 to N - 1")


def read_mesh(arguments: argparse.Namespace) -> Mesh | None:
    """The mesh of --mesh, if it is given."""
    return None if arguments.mesh is None else meshes.make_mesh(arguments.mesh)


def join(arguments: argparse.Namespace) -> None:
    """Connects this process with the others of --coordinator. Only process 0 writes to stdout, and files.

    Raises:
      ValueError: options that do not belong together.
      ConnectionError: the others were not found.
    """
    address, count, number = arguments.coordinator, arguments.num_processes, arguments.process_id
    if address is None:
        if count is not None or number is not None:
            raise ValueError("--num-processes and --process-id need --coordinator HOST:PORT")
        return
    if arguments.mesh is None:
        raise ValueError(f"--coordinator {address}: expected --mesh, which says how the processes share the work")
    known = {"coordinator_address": address, "num_processes": count, "process_id": number}
    if address == "auto":
        known = {}
    elif count is None or number is None or not 0 <= number < count:
        raise ValueError(f"--process-id {number} --num-processes {count}: expected both, the first below the second")
    try:
        jax.distributed.initialize(**known, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS, initialization_timeout=60)
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(f"--coordinator {address}: {' '.join(str(error).split())[:300]}") from error
    _separate_output()
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)
        arguments.json = None


def _separate_output() -> None:
    """Keeps what libraries print out of stdout, and JAX's last words out of stderr (`lost_process`)."""
    results = os.dup(1)
    reader = subprocess.Popen([sys.executable, "-m", "minikv_jax.cli.lost_process"], stdin=subprocess.PIPE)
    assert reader.stdin is not None
    os.dup2(reader.stdin.fileno(), 2)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w", buffering=1)


@contextmanager
def ending_together(arguments: argparse.Namespace) -> Iterator[None]:
    """Ends this process in one line if another one of the run is lost, instead of waiting for it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if arguments.coordinator is None:
            raise
        reason = " ".join(str(error).split())[:200]
        failed = "this process failed" if reason.startswith("RESOURCE_EXHAUSTED") else lost_process.LOST
        print(f"minikv: error: {failed}: {reason}", file=sys.stderr, flush=True)
        os._exit(3)  # an orderly exit would wait for the others
