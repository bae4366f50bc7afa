"""Tests tasks in separate processes."""

import json
import operator
import os
import time

import pytest

from minikv_jax.bench import random_models, worker


def test_worker_returns_results_and_errors():
    assert worker.run_task(json.loads, "[1]") == [1]
    with pytest.raises(ValueError, match="shape 'llama9'"):
        worker.run_task(random_models.shape_config, "llama9")
    with pytest.raises(worker.TaskError, match="list index out of range"):
        worker.run_task(operator.getitem, [], 0)
    with pytest.raises(worker.TaskError, match="exit code 3: no message"):
        worker.run_task(os._exit, 3)
    with pytest.raises(worker.TaskError, match="stopped after 1 s"):
        worker.run_task(time.sleep, 60, seconds=1)
