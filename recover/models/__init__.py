"""To be described."""

from recover.models.capacity import bytes_a_prompt

__all__ = ["bytes_a_prompt"]
