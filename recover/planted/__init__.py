"""Planted worlds: small models with a defense whose correct verdict is known by construction.

Each world is a function of a seed and of sizes. Read `world` first: it describes what worlds are made of. Each
other module derives the correct verdict of its kind at its top; `kinds` lists them by name, and `selftest` runs the
whole check on them (`recover selftest`).
"""

from recover.planted.geometry import degenerate_geometry
from recover.planted.hard import hard_readout
from recover.planted.kinds import KINDS, MIXTURES
from recover.planted.layers import two_layers
from recover.planted.meaning import shared_route, undone_clamp, write_only
from recover.planted.mixtures import half_erased, partly_erased, some_routes, undone_and_route, weak_predicate
from recover.planted.routes import complete_bottleneck, error_bypass, feature_bypass
from recover.planted.selftest import Outcome, run_selftest
from recover.planted.world import Planted

__all__ = [
    "KINDS",
    "MIXTURES",
    "Outcome",
    "Planted",
    "complete_bottleneck",
    "degenerate_geometry",
    "error_bypass",
    "feature_bypass",
    "half_erased",
    "hard_readout",
    "partly_erased",
    "run_selftest",
    "shared_route",
    "some_routes",
    "two_layers",
    "undone_and_route",
    "undone_clamp",
    "weak_predicate",
    "write_only",
]
