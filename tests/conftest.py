"""Fixtures that several test files use."""

import pytest
from transformers import PreTrainedTokenizerBase

from minikv_jax import hub
from minikv_jax.model import Llama


@pytest.fixture(scope="session")
def smollm2() -> tuple[Llama, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32 with its tokenizer; downloaded once, then cached."""
    model, tokenizer = hub.load(hub.DEMO_MODEL)
    assert tokenizer is not None
    return model, tokenizer
