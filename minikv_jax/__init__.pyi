# The public names and the modules that define them. `__init__.py` reads this table to import each on first use.
# isort: off

__all__ = ["presets"]  # the only one under another name than its module gives it

__version__: str

# generate
from minikv_jax.generate import GenerateResult as GenerateResult, generate as generate, stream as stream
from minikv_jax.inference import (
    decode as decode,
    extend as extend,
    prefill as prefill,
    prefill_layer as prefill_layer,
)
from minikv_jax.sampling import Sampling as Sampling

# methods
from minikv_jax.methods import lookup as presets
from minikv_jax.methods.base import (
    Operand as Operand,
    Quantizer as Quantizer,
    ScorerInputs as ScorerInputs,
    load_plugin as load_plugin,
    register_budget as register_budget,
    register_method as register_method,
    register_quantizer as register_quantizer,
    register_scorer as register_scorer,
)
from minikv_jax.methods.config import CacheConfig as CacheConfig

# cache
from minikv_jax.cache import memory as memory
from minikv_jax.cache.checkpoint import restore_cache as restore_cache, save_cache as save_cache
from minikv_jax.cache.state import KVCache as KVCache, LayerCache as LayerCache, append as append

# ops
from minikv_jax.ops.decode_attention import (
    decode_attention as decode_attention,
    extend_attention as extend_attention,
    prefill_attention as prefill_attention,
    quantize as quantize,
)
from minikv_jax.packing import QuantizedArray as QuantizedArray, dequantize as dequantize

# models
from minikv_jax.models.config import ModelConfig as ModelConfig
from minikv_jax.models.decoder import Llama as Llama
from minikv_jax.models.hub import load as load
