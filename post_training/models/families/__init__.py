"""Model families: one file each (``base.py`` says what one is), one row each in ``registry.py``."""

from post_training.models.families.registry import (
    FAMILIES,
    from_huggingface,
    refuse_quantized,
    register_weight_mapping,
    unconvertible,
    with_shape,
)

__all__ = [
    "FAMILIES",
    "from_huggingface",
    "refuse_quantized",
    "register_weight_mapping",
    "unconvertible",
    "with_shape",
]
