"""`minikv calibrate`: learn ranges and rotations for a method that quantises."""

from __future__ import annotations

import argparse
import hashlib
import pathlib

import numpy as np

from minikv_jax import files
from minikv_jax.calibrate import STARTS, Learnt, Settings, calibrate, check_method
from minikv_jax.cli import output, shared
from minikv_jax.evaluation.run import describe_model
from minikv_jax.evaluation.task import need_tokenizer, read_text
from minikv_jax.evaluation.tasks.perplexity import book_windows
from minikv_jax.methods import calibrated
from minikv_jax.methods.method import Method
from minikv_jax.models import hub


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the method, the texts and how to learn."""
    shared.add_run(parser)
    shared.add_method(parser, required=True)
    shared.add_settings(parser)
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a UTF-8 text; repeatable",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="a new directory")
    for flag, default, metavar, text in (
        ("--context", 1024, "N", "prompt tokens of a window"),
        ("--queries", 128, "Q", "tokens after the prompt, whose attention is to stay as it is"),
        ("--limit", 4, "N", "windows of each text"),
        ("--steps", 100, "N", "steps per layer; 0 leaves everything where it starts"),
    ):
        parser.add_argument(
            flag, type=shared.integer, default=default, metavar=metavar, help=f"{text}; default: {default}"
        )
    shared.add_seed(parser, "of the order of the windows")
    parser.add_argument(
        "--rate", type=shared.number, default=0.02, metavar="R", help="Adam's step size; default: %(default)s"
    )
    parser.add_argument(
        "--start",
        default="quantizer",
        choices=STARTS,
        help="where rotations start: at the method's own quantizer or at OSCAR's closed form; default: %(default)s",
    )
    parser.add_argument(
        "--learn", default="rotation", metavar="PARTS", help="rotation, ranges, or both; default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> int:
    """Prints the loss before and after, and saves the calibration."""
    learn = tuple(arguments.learn.split(","))
    settings = Settings(learn, arguments.start, arguments.steps, arguments.rate, arguments.seed)
    method = shared.read_method(arguments)
    texts = {path.name: read_text(path) for path in arguments.text}
    if len(texts) < len(arguments.text):
        raise ValueError("--text names two files alike: expected another name for one of them")
    check_method(hub.load_config(arguments.model), method)
    with files.replacing(arguments.out, patience=0, new=True) as part:  # no other process learns for it meanwhile
        learnt = _learn(arguments, settings, method, texts, part)
    rows = {"loss, mean of all layers": f"{learnt.before.mean():.5f} -> {learnt.after.mean():.5f}"}
    if settings.steps:
        tenths = [values.mean() for values in np.array_split(learnt.curve, min(10, settings.steps))]
        rows["loss while learning"] = " ".join(f"{value:.5f}" for value in tenths)
    rows["layers with a lower loss"] = str((learnt.after < learnt.before).sum())
    output.print_rows(rows | {"use it with": f"--method {arguments.out}"})
    return 0


def _learn(
    arguments: argparse.Namespace, settings: Settings, method: Method, texts: dict[str, str], directory: pathlib.Path
) -> Learnt:
    """Learns from windows of the texts, and saves the calibration in `directory`."""
    model, tokenizer = shared.load_model(arguments)
    encode = need_tokenizer(tokenizer).encode
    windows = [
        window
        for text in texts.values()
        for window in book_windows(
            encode(text, add_special_tokens=False), arguments.context, arguments.queries, arguments.limit
        )
    ]
    with output.ProgressBar("calibrate", model.config.num_hidden_layers) as bar:
        learnt = calibrate(model, windows, method, settings, bar.advance_to)
    details = describe_model(model, arguments.model, arguments.implementation) | {
        "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()},
        "windows": {name: getattr(arguments, name) for name in ("context", "queries", "limit")},
        "settings": vars(settings),
        "loss_before": learnt.before.tolist(),
        "loss_after": learnt.after.tolist(),
        "curve": learnt.curve.tolist(),
    }
    calibrated.save(learnt.calibration, method, model.config, directory, details)
    return learnt
