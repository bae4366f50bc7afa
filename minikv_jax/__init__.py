"""KV-cache compression for JAX: MiniKV's 2-bit, layer-discriminative cache and its neighbours, compiled as one."""

from typing import TYPE_CHECKING, Any

from minikv_jax.cache import memory as memory
from minikv_jax.cache.checkpoint import restore_cache as restore_cache
from minikv_jax.cache.checkpoint import save_cache as save_cache
from minikv_jax.cache.state import KVCache as KVCache
from minikv_jax.cache.state import LayerCache as LayerCache
from minikv_jax.decode import decode as decode
from minikv_jax.decode import extend as extend
from minikv_jax.generate import compile_ahead as compile_ahead
from minikv_jax.generate import generate as generate
from minikv_jax.generate import stream as stream
from minikv_jax.methods import lookup as lookup
from minikv_jax.methods.base import Budget as Budget
from minikv_jax.methods.base import LayerInputs as LayerInputs
from minikv_jax.methods.base import Method as Method
from minikv_jax.methods.base import Operand as Operand
from minikv_jax.methods.base import Quantizer as Quantizer
from minikv_jax.methods.base import ScoredBudget as ScoredBudget
from minikv_jax.methods.base import Scorer as Scorer
from minikv_jax.methods.base import Share as Share
from minikv_jax.methods.base import Tail as Tail
from minikv_jax.methods.base import Tokens as Tokens
from minikv_jax.methods.h2o import H2O as H2O
from minikv_jax.methods.kivi import MinMax as MinMax
from minikv_jax.methods.minikv import Variance as Variance
from minikv_jax.methods.plugins import load_plugin as load_plugin
from minikv_jax.methods.pyramidkv import Pyramid as Pyramid
from minikv_jax.methods.registry import register_budget as register_budget
from minikv_jax.methods.registry import register_method as register_method
from minikv_jax.methods.registry import register_quantizer as register_quantizer
from minikv_jax.methods.registry import register_scorer as register_scorer
from minikv_jax.methods.snapkv import SnapKV as SnapKV
from minikv_jax.methods.twin import Twin as Twin
from minikv_jax.models.config import ModelConfig as ModelConfig
from minikv_jax.models.decoder import Llama as Llama
from minikv_jax.ops.append import append as append
from minikv_jax.ops.decode_attention import decode_attention as decode_attention
from minikv_jax.ops.extend_attention import extend_attention as extend_attention
from minikv_jax.ops.prefill_attention import prefill_attention as prefill_attention
from minikv_jax.ops.quantize import quantize as quantize
from minikv_jax.packing import Packing as Packing
from minikv_jax.packing import QuantizedArray as QuantizedArray
from minikv_jax.packing import dequantize as dequantize
from minikv_jax.prefill import one_shot as one_shot
from minikv_jax.prefill import prefill as prefill
from minikv_jax.prefill import prefill_layer as prefill_layer
from minikv_jax.programs import GenerateResult as GenerateResult
from minikv_jax.sampling import Sampling as Sampling

if TYPE_CHECKING:
    from minikv_jax.models.hub import load as load


def __getattr__(name: str) -> Any:
    """Imports `load` on first use: what it needs (transformers, Orbax) is slow to import."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minikv_jax.models.hub import load

    return load
