"""`minikv calibrate`: arguments, and what it prints and writes. Importing this imports no JAX."""

from __future__ import annotations

import argparse
import hashlib
import pathlib

from minikv_jax.cli.evaluate import add_changes, add_model, load_model, progress


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Fills in `minikv calibrate`."""
    parser.set_defaults(run=_calibrate)
    add_model(parser)
    parser.add_argument("--method", required=True, metavar="NAME[:KEY=VALUE,...]", help="what to calibrate")
    add_changes(parser)
    parser.add_argument(
        "--text",
        type=pathlib.Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a UTF-8 text; may be repeated",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="DIR", help="a new directory")
    for flag, default, metavar, text in (
        ("--context", 1024, "N", "prompt tokens of a window"),
        ("--queries", 128, "Q", "tokens after the prompt, whose attention is to stay as it is"),
        ("--limit", 4, "N", "windows of each text"),
        ("--steps", 100, "N", "steps per layer"),
        ("--seed", 0, "S", "of the order of the windows"),
    ):
        parser.add_argument(flag, type=int, default=default, metavar=metavar, help=f"{text}; default: {default}")
    parser.add_argument("--rate", type=float, default=0.02, metavar="R", help="Adam's step size; default: %(default)s")
    parser.add_argument(
        "--learn", default="rotation", metavar="PARTS", help="rotation, ranges, or both; default: %(default)s"
    )


def _calibrate(arguments: argparse.Namespace) -> int:
    import numpy as np

    from minikv_jax.calibrate import Settings, calibrate, check_method
    from minikv_jax.evaluation.run import describe_model
    from minikv_jax.evaluation.task import need_tokenizer, read_text
    from minikv_jax.evaluation.tasks.perplexity import book_windows
    from minikv_jax.methods import base as schemes
    from minikv_jax.methods import calibrated as calibration
    from minikv_jax.methods import lookup as presets
    from minikv_jax.models import hub

    settings = Settings(tuple(arguments.learn.split(",")), arguments.steps, arguments.rate, arguments.seed)
    for file in arguments.plugin:
        schemes.load_plugin(file)
    config = presets.parse(arguments.method, arguments.set)
    if arguments.out.exists():
        raise FileExistsError(f"--out {arguments.out} exists: a calibration is saved into a new directory")
    contents = {path.name: read_text(path) for path in arguments.text}
    check_method(hub.load_config(arguments.model), config)
    model, tokenizer = load_model(arguments)
    encode = need_tokenizer(tokenizer).encode
    windows = [
        window
        for text in contents.values()
        for window in book_windows(
            encode(text, add_special_tokens=False), arguments.context, arguments.queries, arguments.limit
        )
    ]
    with progress("calibrate", model.config.num_hidden_layers) as bar:
        learnt = calibrate(model, windows, config, settings, bar.advance_to)
    details = describe_model(model, arguments.model, arguments.implementation) | {
        "texts": {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()},
        "windows": {name: getattr(arguments, name) for name in ("context", "queries", "limit")},
        "settings": vars(settings),
        "loss_before": learnt.before.tolist(),
        "loss_after": learnt.after.tolist(),
        "curve": learnt.curve.tolist(),
    }
    calibration.save(learnt.calibration, config, model.config, arguments.out, details)
    print(f"loss, mean of all layers    {learnt.before.mean():.5f} -> {learnt.after.mean():.5f}")
    tenths = [part.mean() for part in np.array_split(learnt.curve, min(10, len(learnt.curve)))]
    print(f"the same, while learning    {' '.join(f'{value:.5f}' for value in tenths)}")
    print(f"layers that gained          {(learnt.after < learnt.before).sum()}")
    print(f"use it as                   --method {arguments.out}")
    return 0
