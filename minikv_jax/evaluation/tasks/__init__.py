"""The tasks by name. A new task is a file here and a name in `TASKS`."""

from minikv_jax.evaluation.task import Task
from minikv_jax.evaluation.tasks.cases import Cases
from minikv_jax.evaluation.tasks.gsm8k import GSM8K
from minikv_jax.evaluation.tasks.infinitebench import InfiniteBench
from minikv_jax.evaluation.tasks.kv_retrieval import KVRetrieval
from minikv_jax.evaluation.tasks.longbench import LongBench
from minikv_jax.evaluation.tasks.longeval import LongEval
from minikv_jax.evaluation.tasks.needle import Needle
from minikv_jax.evaluation.tasks.number_string import NumberString
from minikv_jax.evaluation.tasks.passkey import Passkey
from minikv_jax.evaluation.tasks.perplexity import Perplexity

_ALL = (Cases, Perplexity, Needle, Passkey, NumberString, KVRetrieval, LongEval, LongBench, InfiniteBench, GSM8K)
TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}
