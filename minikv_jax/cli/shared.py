"""Options shared by several commands, and the methods, plugins and model that they select."""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import jax
from jax.sharding import Mesh

from minikv_jax.arrays import FLOATING
from minikv_jax.checks import read_integer, read_number
from minikv_jax.cli.output import status
from minikv_jax.evaluation.fit import SizedMethod
from minikv_jax.methods import contracts, lookup
from minikv_jax.methods.method import Method
from minikv_jax.methods.plugins import load_plugin
from minikv_jax.models import hub, packaged
from minikv_jax.models.decoder import Llama
from minikv_jax.models.partition import check_mesh
from minikv_jax.ops import dispatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_Options = argparse._ActionsContainer  # a parser, or a group of a parser's arguments

# Types of arguments ---------------------------------------------------------------------------------------------------


def key_value(text: str) -> tuple[str, str]:
    """Parses `KEY=VALUE`."""
    key, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r}: expected KEY=VALUE")
    return key, value


def output_file(text: str) -> pathlib.Path:
    """Parses the path of a file to be written, whose directory must exist."""
    path = pathlib.Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a file in a directory that exists")
    return path


def output_directory(text: str) -> pathlib.Path:
    """Parses the path of a directory to be written to, new or not."""
    path = pathlib.Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file: expected a directory")
    return path


def argument(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Wraps `parse` so that argparse shows the text of its ValueError."""

    def parse_argument(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_argument


integer = argument(read_integer)
number = argument(read_number)


def seed(text: str) -> int:
    """Parses a seed of `jax.random.key`."""
    value = integer(text)
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text!r}: expected an integer of 64 bits")
    return value


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected at least 1")
    return value


def _shares(text: str) -> tuple[float, ...]:
    try:
        shares = tuple(read_number(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected shares such as 0.125,0.25") from error
    if not all(0 < share <= 1 for share in shares):
        raise argparse.ArgumentTypeError(f"{text!r}: expected shares above 0 and up to 1")
    return shares


# Options --------------------------------------------------------------------------------------------------------------


def add_model(options: _Options, *, required: bool = True) -> None:
    """Adds --model."""
    text = f"a directory, a .gguf file, a hub id, or {hub.DEMO_MODEL}"
    if required:
        options.add_argument("--model", required=True, help=text)
    else:
        options.add_argument("--model", help=text)  # in a group, one of which is required


def add_dtype(options: _Options, default: str | None = None) -> None:
    """Adds --dtype."""
    text = default or "float32 on a CPU, bfloat16 elsewhere"
    options.add_argument("--dtype", choices=FLOATING, default=default, help=f"default: {text}")


def add_implementation(options: _Options) -> None:
    """Adds --implementation."""
    names = ", ".join(dispatch.IMPLEMENTATIONS)
    options.add_argument("--implementation", metavar="NAME", help=f"one of {names}; default: the fastest measured")


def add_verbose(options: _Options) -> None:
    """Adds --verbose."""
    options.add_argument(
        "--verbose", action="store_true", help="name the implementation of each op; show the traceback of an error"
    )


def add_run(options: _Options) -> None:
    """Adds the options of every command that runs a model."""
    add_model(options)
    add_dtype(options)
    options.add_argument(
        "--allow-nonfinite", action="store_true", help="load weights with NaN or infinite values nevertheless"
    )
    add_implementation(options)
    add_verbose(options)


def add_json(options: _Options) -> None:
    """Adds --json."""
    options.add_argument("--json", type=output_file, metavar="OUT", help="also write the result as JSON")


def add_directory(options: _Options) -> None:
    """Adds --out."""
    options.add_argument("--out", type=output_directory, required=True, metavar="DIR", help="where the files go")


def add_max_new_tokens(options: _Options, default: int, *more_flags: str, text: str = "") -> None:
    """Adds --max-new-tokens."""
    options.add_argument(
        "--max-new-tokens", *more_flags, type=integer, default=default, metavar="N", help=f"{text}default: {default}"
    )


def add_seed(options: _Options, text: str) -> None:
    """Adds --seed."""
    options.add_argument("--seed", type=seed, default=0, metavar="S", help=f"{text}; default: %(default)s")


def add_method(options: _Options, **how: Any) -> None:
    """Adds --method.

    Args:
      how: of `add_argument`: `default`, `required`, `action` or `help`.
    """
    how.setdefault("help", "see `minikv methods`" + ("; default: %(default)s" if "default" in how else ""))
    options.add_argument("--method", metavar="NAME[:KEY=VALUE,...]", **how)


def add_settings(options: _Options) -> None:
    """Adds --set and --plugin."""
    options.add_argument(
        "--set",
        type=key_value,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of every method; repeatable",
    )
    add_plugin(options)


def add_plugin(options: _Options) -> None:
    """Adds --plugin."""
    options.add_argument(
        "--plugin",
        type=pathlib.Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file that registers methods or their parts; repeatable",
    )


def add_methods(options: _Options) -> None:
    """Adds several methods: --method, --set, --plugin and --budget-bytes."""
    add_method(options, action="append", required=True, help="see `minikv methods`; repeatable")
    add_settings(options)
    options.add_argument(
        "--budget-bytes",
        type=_shares,
        default=(),
        metavar="SHARE[,SHARE...]",
        help="fit every method's token budget to these shares of the full cache's bytes",
    )


# Values ---------------------------------------------------------------------------------------------------------------


def load_plugins(arguments: argparse.Namespace) -> None:
    """Runs the files of --plugin."""
    for file in arguments.plugin:
        load_plugin(file)


def read_method(arguments: argparse.Namespace) -> Method:
    """The method of --method, --set and --plugin."""
    load_plugins(arguments)
    return lookup.parse(arguments.method, arguments.set)


def read_methods(arguments: argparse.Namespace) -> dict[str, SizedMethod]:
    """The methods of `add_methods` or `add_method`, keyed by their text and, if given, their share of bytes."""
    load_plugins(arguments)
    methods: dict[str, SizedMethod] = {}
    for text in arguments.method:
        method = lookup.parse(text, arguments.set)
        for share in getattr(arguments, "budget_bytes", ()) or (None,):
            label = text if share is None else f"{text} @ {share:.4g}"
            if label in methods:
                raise ValueError(f"method {label!r} is given twice")
            methods[label] = SizedMethod(method, share)
    return methods


def load_model(
    arguments: argparse.Namespace, methods: Iterable[Method] = (), mesh: Mesh | None = None
) -> tuple[Llama, PreTrainedTokenizerBase | None]:
    """The model of `add_run`'s options, and its tokenizer if it has one.

    Args:
      methods: checked against the model's config before its weights are loaded.
      mesh: devices to split the model over; checked likewise.
    """
    dispatch.check_implementation(arguments.implementation)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(packaged.cache_directory() / "compiled"))
    dtype = arguments.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    with status(f"loading {arguments.model}"):
        methods = list(methods)
        if methods or mesh is not None:
            config = hub.load_config(arguments.model)
            for method in methods:
                contracts.check(method, config)
            if mesh is not None:
                check_mesh(config, mesh)
        return hub.load(arguments.model, dtype=dtype, mesh=mesh, allow_nonfinite=arguments.allow_nonfinite)


def need_matplotlib(advice: str = "") -> None:
    """Raises ValueError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError(f"figures need matplotlib: pip install minikv_jax[evaluation]{advice}")
