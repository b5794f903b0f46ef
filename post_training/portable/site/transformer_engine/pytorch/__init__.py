"""Modules and functions for PyTorch."""

from transformer_engine.pytorch import attention as attention
from transformer_engine.pytorch import cpu_offload as cpu_offload
from transformer_engine.pytorch import distributed as distributed
from transformer_engine.pytorch import fp8 as fp8
from transformer_engine.pytorch import router as router
from transformer_engine.pytorch import tensor as tensor
from transformer_engine.pytorch.attention import DotProductAttention as DotProductAttention
from transformer_engine.pytorch.fp8 import fp8_autocast as fp8_autocast
from transformer_engine.pytorch.fp8 import fp8_model_init as fp8_model_init
from transformer_engine.pytorch.module.grouped_linear import GroupedLinear as GroupedLinear
from transformer_engine.pytorch.module.layernorm_linear import LayerNormLinear as LayerNormLinear
from transformer_engine.pytorch.module.linear import Linear as Linear
from transformer_engine.pytorch.module.norms import LayerNorm as LayerNorm
from transformer_engine.pytorch.module.norms import RMSNorm as RMSNorm
