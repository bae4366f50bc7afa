"""KV-cache compression for JAX: MiniKV's 2-bit, layer-discriminative cache and its neighbours, compiled as one."""

from typing import TYPE_CHECKING, Any

from minikv_jax.cache import memory as memory
from minikv_jax.cache.checkpoint import restore_cache as restore_cache
from minikv_jax.cache.checkpoint import save_cache as save_cache
from minikv_jax.cache.state import KVCache as KVCache
from minikv_jax.cache.state import LayerCache as LayerCache
from minikv_jax.cache.state import append as append
from minikv_jax.generate import GenerateResult as GenerateResult
from minikv_jax.generate import generate as generate
from minikv_jax.generate import stream as stream
from minikv_jax.inference import decode as decode
from minikv_jax.inference import extend as extend
from minikv_jax.inference import prefill as prefill
from minikv_jax.inference import prefill_layer as prefill_layer
from minikv_jax.methods import base as schemes
from minikv_jax.methods import lookup
from minikv_jax.methods.base import Operand as Operand
from minikv_jax.methods.base import Quantizer as Quantizer
from minikv_jax.methods.base import ScorerInputs as ScorerInputs
from minikv_jax.methods.base import load_plugin as load_plugin
from minikv_jax.methods.base import register_budget as register_budget
from minikv_jax.methods.base import register_method as register_method
from minikv_jax.methods.base import register_quantizer as register_quantizer
from minikv_jax.methods.base import register_scorer as register_scorer
from minikv_jax.methods.config import CacheConfig as CacheConfig
from minikv_jax.models.config import ModelConfig as ModelConfig
from minikv_jax.models.decoder import Llama as Llama
from minikv_jax.ops.decode_attention import decode_attention as decode_attention
from minikv_jax.ops.decode_attention import extend_attention as extend_attention
from minikv_jax.ops.decode_attention import prefill_attention as prefill_attention
from minikv_jax.ops.decode_attention import quantize as quantize
from minikv_jax.packing import QuantizedArray as QuantizedArray
from minikv_jax.packing import dequantize as dequantize
from minikv_jax.sampling import Sampling as Sampling

if TYPE_CHECKING:
    from minikv_jax.models.hub import load as load


def __getattr__(name: str) -> Any:
    """Imports `load` on first use: what it needs (transformers, Orbax) is slow to import."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from minikv_jax.models.hub import load

    return load


presets = lookup
schemes.seal()
