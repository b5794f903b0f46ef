"""The switch that fine-grained activation offloading sets on Transformer Engine.

pipeline_parallel/fine_grained_activation_offload.py:784-801 insists on the module. Offloading of
whole layers (``--cpu-offloading``) needs ``get_cpu_offload_context``, which is missing here, so
that transformer/transformer_block.py:314 refuses it.
"""

CPUOffloadEnabled = False
