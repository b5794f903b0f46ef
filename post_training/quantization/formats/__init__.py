"""Quantization formats: their names, what they do to a model, and what they are exported as.

One file a family of number formats (``fp8``, ``nvfp4``, ``mx``, ``integer``, ``kv_cache``) holds
every fact about it; ``registry`` lists the families, ``exportable`` decides what engines read
(``quantization/engines``). Nothing here imports torch or ModelOpt: the command line is checked
before they are loaded.
"""
