"""Writes task files of the lm-evaluation-harness over rows of our own, as JSON Lines."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

CHOICES = """
task: colours
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
ANSWERS = """
task: endings
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{ending}}"
generation_kwargs: {max_gen_toks: 12, do_sample: false, temperature: 1, until: ["Z", "\\n"]}
metric_list: [{metric: exact_match}]
"""
_DATA = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
"""


def write_task(directory: pathlib.Path, task: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a task file and its rows to a directory for --include-path."""
    name = task.split("task: ")[1].splitlines()[0]
    data = directory / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data_lines = _DATA.format(rows=data, cache=directory / "cache")
    (directory / f"{name}.yaml").write_text(task + data_lines)
