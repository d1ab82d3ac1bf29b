"""Every kind of planted world by name."""

from collections.abc import Callable

from recover.planted.geometry import degenerate_geometry
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
"""The nine kinds, in the order of their numbers."""

MIXTURES: dict[str, Callable[..., Planted]] = {
    mixture.__name__: mixture for mixture in (half_erased, partly_erased, some_routes, undone_and_route, weak_predicate)
}
"""Worlds between the kinds."""
