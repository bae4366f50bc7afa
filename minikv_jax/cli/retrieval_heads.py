"""`minikv retrieval-heads`: find the KV heads that have to keep all tokens."""

from __future__ import annotations

import argparse
import pathlib

from minikv_jax.cli import output, shared
from minikv_jax.evaluation.run import describe_model
from minikv_jax.evaluation.task import need_tokenizer, numbers
from minikv_jax.evaluation.tasks.multi_question import MultiQuestion
from minikv_jax.models import hub
from minikv_jax.retrieval_heads import Question, check_count, importance, most_important


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the texts, and how many heads to find."""
    shared.add_run(parser)
    parser.add_argument(
        "--haystack",
        type=pathlib.Path,
        action="append",
        required=True,
        metavar="FILE",
        help="a UTF-8 text in which numbers are hidden; repeatable",
    )
    for flag, default, metavar, text in (
        ("--heads", None, "N", "number of heads to find"),
        ("--samples", 2, "N", "texts of each length from each file, with two numbers each"),
        ("--recent", 32, "N", "newest tokens that all heads see"),
        ("--sinks", 4, "N", "leading tokens that all heads see"),
    ):
        shown = text if default is None else f"{text}; default: {default}"
        parser.add_argument(
            flag, type=shared.integer, default=default, required=default is None, metavar=metavar, help=shown
        )
    parser.add_argument(
        "--context",
        type=shared.argument(numbers(int)),
        default=(1024, 4096),
        metavar="N,N",
        help="tokens of a text, one or more lengths; default: 1024,4096",
    )
    shared.add_seed(parser, "of the hidden numbers")
    shared.add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prints the heads as a setting of a method."""
    if arguments.implementation not in (None, "xla"):
        raise NotImplementedError(f"implementation={arguments.implementation!r}: gates are computed by xla only")
    tasks = [
        MultiQuestion(
            haystack=path,
            context=arguments.context,
            depths=(0.25, 0.75),
            samples=arguments.samples,
            seed=arguments.seed,
        )
        for path in arguments.haystack
    ]
    sizes = hub.load_config(arguments.model)
    check_count(arguments.heads, sizes.num_hidden_layers * sizes.num_key_value_heads)
    model, tokenizer = shared.load_model(arguments)
    cases = [
        case for task in tasks for case in task.cases(need_tokenizer(tokenizer), model.config.max_position_embeddings)
    ]
    questions = [Question(case.prompt, case.question + case.continuation, len(case.continuation)) for case in cases]
    with output.ProgressBar("retrieval-heads", len(questions)) as bar:
        found = importance(model, questions, sinks=arguments.sinks, recent=arguments.recent, done=bar.advance_to)
    heads = most_important(found, arguments.heads)
    setting = "retrieval_heads=" + "+".join(f"{layer}.{head}" for layer, head in heads)
    part = sum(found[layer, head] for layer, head in heads) / found.clip(min=0).sum()
    output.print_rows({"setting": setting, "their share of all heads' importance": f"{part:.0%}"})
    details = describe_model(model, arguments.model, "xla")
    details |= {"questions": len(questions), "retrieval_heads": heads, "importance": found.tolist()}
    output.write_json(arguments.json, details)
    return 0
