"""A pure-PyTorch package in the shape of mamba_ssm, as far as megatron-core 0.19.2 uses it.

It belongs to ``post_training.portable``, which loads it only where the real package, whose kernels
are Triton's, cannot run. Names and signatures follow the real package because megatron-core's
ssm/mamba_mixer.py calls them; the algorithm is written from the paper (arXiv 2405.21060). CPU and
CUDA, differentiable. ``state_dtype`` is left out of the signatures: megatron-core asks for it only
where it is there.
"""

__version__ = "2.2.5+portable"
