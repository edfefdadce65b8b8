"""Multi-head Latent Attention for JAX with exact FP4 weights: one packed copy, decoded inside the kernels."""

from mla_fp4_jax.cache import LatentCache as LatentCache
from mla_fp4_jax.cache import PagedLatentCache as PagedLatentCache
from mla_fp4_jax.cache import init_cache as init_cache
from mla_fp4_jax.checkpoint import load_mla_layer as load_mla_layer
from mla_fp4_jax.checkpoint import load_mla_layers as load_mla_layers
from mla_fp4_jax.config import MLAConfig as MLAConfig
from mla_fp4_jax.config import RopeConfig as RopeConfig
from mla_fp4_jax.errors import CheckpointError as CheckpointError
from mla_fp4_jax.fp4_array import FP4Array as FP4Array
from mla_fp4_jax.functional import mla_decode as mla_decode
from mla_fp4_jax.functional import mla_prefill as mla_prefill
from mla_fp4_jax.kv_b_proj import one_pack as one_pack
from mla_fp4_jax.kv_b_proj import unpack_kv_b_proj as unpack_kv_b_proj
from mla_fp4_jax.mla import FP4Weight as FP4Weight
from mla_fp4_jax.mla import MLAAttention as MLAAttention
from mla_fp4_jax.ops import fp4_bmm as fp4_bmm
from mla_fp4_jax.ops import fp4_linear as fp4_linear
from mla_fp4_jax.quantize import quantize_mxfp4 as quantize_mxfp4
from mla_fp4_jax.quantize import quantize_nvfp4 as quantize_nvfp4
from mla_fp4_jax.sharding import MLASharding as MLASharding
from mla_fp4_jax.weights import MLAWeights as MLAWeights

__version__ = "0.1.0"
