"""To be described."""

from recover.numerics.statistics import wilson

__all__ = ["wilson"]
