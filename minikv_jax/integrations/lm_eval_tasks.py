"""Tasks of EleutherAI's lm-evaluation-harness: loads them by name and runs them on a language model."""

from __future__ import annotations

import pathlib
import random
import shutil
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from minikv_jax import checks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SEED = 1234  # the harness's own, of numpy and of few-shot examples


class TaskSelection:
    """Tasks chosen by name, whose data are not read yet.

    Args:
      names: names of tasks, groups and tags, or patterns of them.
      include_path: a directory of task files, which come before the harness's own of the same name.
      metadata: values for tasks that make up their prompts: `{"max_seq_lengths": [4096]}` (RULER).

    Raises:
      ValueError: no task has one of the names.
      FileNotFoundError: `include_path` is not a directory.
    """

    def __init__(
        self,
        names: Sequence[str],
        include_path: pathlib.Path | None = None,
        metadata: Mapping[str, Any] | None = None,
    ):
        if include_path is not None and not include_path.is_dir():
            raise FileNotFoundError(f"{include_path} is not a directory of task files")
        self._tokenizer = pathlib.Path(tempfile.gettempdir(), f"minikv-{uuid.uuid4()}")  # tasks read it from there
        how: dict[str, Any] = {
            "include_path": None if include_path is None else str(include_path),
            "metadata": {"tokenizer": str(self._tokenizer), **(metadata or {})},
        }
        # Reading the harness's own thousands of files takes seconds, and the directory may have all the names.
        self._manager = TaskManager(include_defaults=False, **how)
        if _missing(self._manager, names):
            self._manager = TaskManager(**how)
        if missing := _missing(self._manager, names):
            place = "" if include_path is None else f", nor has {include_path}"
            raise ValueError(f"task {', '.join(missing)}: the harness has none of this name{place}")
        self._names = self._manager.match_tasks(list(names))

    def load(self, tokenizer: PreTrainedTokenizerBase, num_fewshot: int | None = None) -> dict[str, Any]:
        """Reads the tasks' data, which may be downloaded, or makes them.

        Args:
          tokenizer: for tasks that make up prompts of a number of tokens.
          num_fewshot: examples per prompt; None for the task's own number. A task that wants none gets none.

        Returns:
          The tasks, for `run_tasks`.

        Raises:
          ValueError: a task needs a package that is not installed.
          OSError: the data are not there and cannot be downloaded.
        """
        checks.at_least(0, num_fewshot=num_fewshot)
        random.seed(0)
        np.random.seed(_SEED)  # noqa: NPY002 (tasks draw from it)
        try:
            tokenizer.save_pretrained(self._tokenizer)
            tasks: dict[str, Any] = dict(self._manager.load(self._names))
        except ImportError as error:
            raise ValueError(f"a task needs a package that is not installed: {checks.reason(error)}") from error
        finally:
            shutil.rmtree(self._tokenizer, ignore_errors=True)
        for task in tasks["tasks"].values():
            own = task.get_config("num_fewshot")
            if own is None or (num_fewshot is not None and own != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
        return tasks


def _missing(manager: TaskManager, names: Sequence[str]) -> list[str]:
    return [name for name in names if not manager.match_tasks([name])]


def run_tasks(
    lm: LM, tasks: Mapping[str, Any], *, limit: int | None = None, chat_template: bool = False, samples: bool = False
) -> dict[str, Any]:
    """Runs tasks, the same prompts every time.

    Args:
      lm: the language model.
      tasks: from `TaskSelection.load`.
      limit: take the first `limit` documents of each task.
      chat_template: put prompts into the model's chat template, with examples as turns.
      samples: also return each document's answer and scores.

    Returns:
      The harness's results: `results` by task, `groups` if there are any, `versions`, `n-shot`, `n-samples`, `samples`.
    """
    checks.at_least(1, limit=limit)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=_SEED)
    results = evaluator.evaluate(
        lm=lm,
        task_dict=dict(tasks),
        limit=limit,
        log_samples=samples,
        apply_chat_template=chat_template,
        fewshot_as_multiturn=chat_template,
    )
    return dict(results or {})
