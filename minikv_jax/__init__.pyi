# The public names and the modules that define them. `__init__.py` reads this table to import each on first use.
# isort: off

__version__: str

# generate
from minikv_jax.generate import compile_ahead as compile_ahead, generate as generate, stream as stream
from minikv_jax.programs import GenerateResult as GenerateResult
from minikv_jax.sampling import Sampling as Sampling
from minikv_jax.one_shot import one_shot as one_shot
from minikv_jax.prefill import prefill as prefill, prefill_layer as prefill_layer
from minikv_jax.decode import decode as decode, extend as extend

# methods
from minikv_jax.methods import lookup as lookup
from minikv_jax.methods.base import (
    Budget as Budget,
    KeptTokens as KeptTokens,
    LayerInputs as LayerInputs,
    Operand as Operand,
    Quantizer as Quantizer,
    Refit as Refit,
    ScoredBudget as ScoredBudget,
    Scorer as Scorer,
)
from minikv_jax.fields import setting as setting
from minikv_jax.methods.method import Method as Method, Share as Share, Tail as Tail, Tokens as Tokens
from minikv_jax.methods.plugins import load_plugin as load_plugin
from minikv_jax.methods.registry import (
    register_budget as register_budget,
    register_method as register_method,
    register_quantizer as register_quantizer,
    register_refit as register_refit,
    register_scorer as register_scorer,
)
from minikv_jax.methods.attention_matching import RmsVotes as RmsVotes
from minikv_jax.methods.critical_kv import CriticalKV as CriticalKV
from minikv_jax.methods.expected_attention import ExpectedAttention as ExpectedAttention
from minikv_jax.methods.fp8 import FP8 as FP8
from minikv_jax.methods.grkv import Ridge as Ridge
from minikv_jax.methods.h2o import H2O as H2O
from minikv_jax.methods.hqq import HQQ as HQQ
from minikv_jax.methods.keydiff import KeyDiff as KeyDiff
from minikv_jax.methods.kivi import MinMax as MinMax
from minikv_jax.methods.knorm import KNorm as KNorm
from minikv_jax.methods.lagkv import LagKV as LagKV
from minikv_jax.methods.minikv import Variance as Variance
from minikv_jax.methods.nvfp4 import NVFP4 as NVFP4
from minikv_jax.methods.pyramidkv import Pyramid as Pyramid
from minikv_jax.methods.quarot import Hadamard as Hadamard
from minikv_jax.methods.rest_kv import ReSTKV as ReSTKV
from minikv_jax.methods.rtn import RTN as RTN
from minikv_jax.methods.snapkv import SnapKV as SnapKV
from minikv_jax.methods.tova import TOVA as TOVA
from minikv_jax.methods.turboquant import TurboQuant as TurboQuant
from minikv_jax.methods.twin import Twin as Twin

# cache
from minikv_jax.cache import memory as memory
from minikv_jax.cache.checkpoint import restore_cache as restore_cache, save_cache as save_cache
from minikv_jax.cache.kv_cache import KVCache as KVCache
from minikv_jax.cache.state import LayerCache as LayerCache

# ops
from minikv_jax.arrays import debug_checks as debug_checks
from minikv_jax.ops.append import append as append
from minikv_jax.ops.decode_attention import decode_attention as decode_attention
from minikv_jax.ops.extend_attention import extend_attention as extend_attention
from minikv_jax.ops.prefill_attention import prefill_attention as prefill_attention
from minikv_jax.ops.quantize import quantize as quantize
from minikv_jax.packing import Packing as Packing, QuantizedArray as QuantizedArray, dequantize as dequantize

# devices
from minikv_jax.meshes import make_mesh as make_mesh, place_cache as place_cache
from minikv_jax.models.partition import shard_model as shard_model

# models
from minikv_jax.models.config import ModelConfig as ModelConfig
from minikv_jax.models.decoder import Llama as Llama
from minikv_jax.models.hub import load as load
