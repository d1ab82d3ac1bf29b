"""Planted defenses: small worlds where the right answer is known by construction.

Every kind is a function of a seed and of sizes, so there are infinitely many of each. `world` says what they are made
of; the derivation of each answer stands at the top of the module of its kind.
"""

from collections.abc import Callable

from recover.planted.degenerate import degenerate_geometry
from recover.planted.hard import hard_readout
from recover.planted.layers import two_layers
from recover.planted.meaning import shared_route, undone_clamp, write_only
from recover.planted.routes import complete_bottleneck, error_bypass, feature_bypass
from recover.planted.world import Planted

KINDS: dict[str, Callable[..., Planted]] = {
    kind.__name__: kind
    for kind in (
        complete_bottleneck,
        error_bypass,
        feature_bypass,
        write_only,
        shared_route,
        two_layers,
        hard_readout,
        undone_clamp,
        degenerate_geometry,
    )
}
"""Every kind by name, in the order of their numbers, 1 to 9."""

__all__ = [
    "KINDS",
    "Planted",
    "complete_bottleneck",
    "degenerate_geometry",
    "error_bypass",
    "feature_bypass",
    "hard_readout",
    "shared_route",
    "two_layers",
    "undone_clamp",
    "write_only",
]
