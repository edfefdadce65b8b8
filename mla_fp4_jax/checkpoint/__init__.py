"""Checkpoints: safetensors in and out, one reader per weight format, and the loader of layers."""

from mla_fp4_jax.checkpoint.load import load_mla_layer as load_mla_layer
from mla_fp4_jax.checkpoint.load import load_mla_layers as load_mla_layers
from mla_fp4_jax.checkpoint.plan import plan_mla_layer as plan_mla_layer
from mla_fp4_jax.checkpoint.plan import plan_mla_layers as plan_mla_layers
from mla_fp4_jax.checkpoint.safetensors import SafetensorsFile as SafetensorsFile
from mla_fp4_jax.checkpoint.writer import write_safetensors as write_safetensors
