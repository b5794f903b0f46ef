"""What does not depend on a framework: the recipes of low-precision training."""

from transformer_engine.common import recipe

__all__ = ["recipe"]
