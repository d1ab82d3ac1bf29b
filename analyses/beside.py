"""Published figures beside a script's own: those of the defense that it is given, else of the published setting."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recover.run.config import Config, load_config

PUBLISHED = Path(__file__).parent / "published"


def published_rows(config: Config, otherwise: str) -> Mapping[str, Mapping[str, float]]:
    """`published.rows`, by name and column.

    Args:
        config: of the defense.
        otherwise: the file in `analyses/published` whose rows are taken where it has none.
    """
    if config.published is not None and config.published.rows:
        return config.published.rows
    given = load_config(PUBLISHED / otherwise).published
    return {} if given is None else given.rows
