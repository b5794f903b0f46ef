"""Stored weights -> float32, one file a format.

Only torch is used: no ModelOpt, no megatron-core and nothing of the code that writes exports, so
that a mistake there is not repeated here.
"""
