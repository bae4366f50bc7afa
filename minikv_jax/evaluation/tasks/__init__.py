"""Registry of tasks. A new task is a new file here: every class with a `name` and a `summary` is a task."""

import importlib
import pkgutil
from collections.abc import Iterator

from minikv_jax.evaluation.task import Task


def _tasks() -> Iterator[type[Task]]:
    for file in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{file.name}")
        for value in vars(module).values():
            is_own_class = isinstance(value, type) and value.__module__ == module.__name__
            if is_own_class and {"name", "summary"} <= vars(value).keys():
                yield value


TASKS: dict[str, type[Task]] = {task.name: task for task in _tasks()}
