"""A pure-PyTorch package in the shape of Transformer Engine, as far as megatron-core 0.19.2 and
ModelOpt 0.47.0 use it. CPU and CUDA.

It belongs to ``post_training.portable``, which puts it on the import path only where the real
package cannot run. It has no FP8 or FP4 computation (asking for it is an error), no fused kernels
and no communication overlap. Names, signatures and state-dict keys follow the real package because
its callers use them; each docstring says which file of megatron-core (paths below
``megatron/core``) or ModelOpt (below ``modelopt/torch``) does. What those files import inside
``try`` and replace themselves is left out: permutations, cross entropy, ``_SplitAlongDim``,
``general_gemm`` as a function of its own, ``Fp8Padding``, ``optimizers``, ``graph``.

The version decides which code of megatron-core and ModelOpt runs. 2.8.0 is the lowest that has all
that is needed: attention masks while training through a KV cache (2.2.0, EAGLE3,
transformer/attention.py:620-629), rotary embeddings with ``interleaved`` (2.3.0), learnable
softmax offsets (2.8.0, gpt-oss). Above it megatron-core expects what is not here (2.9.0: maximum
attention logits; 2.10.0: ``num_splits``; 2.14.0: fused grouped operations; 2.19.0: generalized
tensor parallelism).
"""

from transformer_engine import common, pytorch

__version__ = "2.8.0+portable"

__all__ = ["common", "pytorch"]
