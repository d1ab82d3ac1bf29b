"""To be described."""

from recover.defenses.defended import clamp_edits
from recover.defenses.selection import attributions
from recover.defenses.speech import say

__all__ = ["attributions", "clamp_edits", "say"]
