"""What the sections of a verdict are made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from recover.protocol.records import Figure

__all__ = ["Figure", "Interval", "Section"]

Interval = Annotated[tuple[Figure, Figure], Field(description="95% confidence interval, low and high")]


class Section(BaseModel):
    """A part of a verdict: it cannot be changed, and has no keys but those named."""

    model_config = ConfigDict(frozen=True, extra="forbid")
