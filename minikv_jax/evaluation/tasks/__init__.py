"""The tasks by name. A new task is a file here and a line in `TASKS`."""

from minikv_jax.evaluation.task import Task
from minikv_jax.evaluation.tasks.cases import Cases
from minikv_jax.evaluation.tasks.perplexity import Perplexity

TASKS: dict[str, type[Task]] = {task.name: task for task in (Cases, Perplexity)}
