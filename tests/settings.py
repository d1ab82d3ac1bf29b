"""What `check` is given, from loose settings: those of its runtime, schedule and surface are put where they belong."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from recover.protocol.plan import Plan
from recover.protocol.runtime import Runtime

RUNTIME, PLAN = [one.name for one in fields(Runtime)], ["schedule", "surface"]


def arranged(**loose: Any) -> dict[str, Any]:
    """Keyword arguments of `check`, of settings such as `batch_size=5, schedule=Schedule(10)`."""
    runtime = {name: loose.pop(name) for name in RUNTIME if name in loose}
    plan = {name: loose.pop(name) for name in PLAN if name in loose}
    return loose | {"plan": replace(loose.get("plan") or Plan(), **plan), "runtime": Runtime(**runtime)}
