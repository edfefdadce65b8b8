"""Products with packed FP4 weights and attention over the latent cache: one API, several implementations."""

from mla_fp4_jax.ops.bmm import fp4_bmm as fp4_bmm
from mla_fp4_jax.ops.linear import fp4_linear as fp4_linear
from mla_fp4_jax.ops.mla_decode import mla_decode as mla_decode
from mla_fp4_jax.ops.mla_prefill import mla_prefill_attention as mla_prefill_attention
