"""What an MLA layer is, and how that is read from a Hugging Face config."""

from mla_fp4_jax.config.layer import MLAConfig as MLAConfig
from mla_fp4_jax.config.layer import RopeConfig as RopeConfig
