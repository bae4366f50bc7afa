"""StreamingLLM (arXiv 2309.17453; https://github.com/mit-han-lab/streaming-llm): keeps sinks and the newest tokens."""

from minikv_jax.methods.method import Method
from minikv_jax.methods.registry import register_method

register_method(
    Method(
        name="streaming-llm",
        citation="StreamingLLM, arXiv 2309.17453: 4 sink tokens + the newest 1020",
        sinks=4,
        recent=1020,
    )
)
