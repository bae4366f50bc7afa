"""Measures how a compressed cache changes a model: tasks, measurements and sweeps (docs/evaluation.md)."""

from minikv_jax.evaluation.fit import SizedMethod as SizedMethod
from minikv_jax.evaluation.measure import Measurement as Measurement
from minikv_jax.evaluation.measure import measure as measure
from minikv_jax.evaluation.run import Evaluator as Evaluator
from minikv_jax.evaluation.run import evaluate as evaluate
from minikv_jax.evaluation.task import Case as Case
from minikv_jax.evaluation.task import Task as Task
from minikv_jax.evaluation.tasks.perplexity import book_windows as book_windows
