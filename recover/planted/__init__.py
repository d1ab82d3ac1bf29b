"""Planted defenses: small worlds where the right answer is known by construction.

Every kind is a function of a seed and of sizes, so there are infinitely many of each. `world` says what they are made
of; the derivation of each answer stands at the top of the module of its kind.
"""

from collections.abc import Callable

from recover.planted.degenerate import degenerate_geometry
from recover.planted.hard import hard_readout
from recover.planted.layers import two_layers
from recover.planted.meaning import shared_route, undone_clamp, write_only
from recover.planted.mixtures import half_erased, partly_erased, some_routes, undone_and_route, weak_predicate
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

MIXTURES: dict[str, Callable[..., Planted]] = {
    mixture.__name__: mixture for mixture in (half_erased, partly_erased, some_routes, undone_and_route, weak_predicate)
}
"""Worlds between the kinds, by name."""

__all__ = [
    "KINDS",
    "MIXTURES",
    "Planted",
    "complete_bottleneck",
    "degenerate_geometry",
    "error_bypass",
    "feature_bypass",
    "half_erased",
    "hard_readout",
    "partly_erased",
    "shared_route",
    "some_routes",
    "two_layers",
    "undone_and_route",
    "undone_clamp",
    "weak_predicate",
    "write_only",
]
