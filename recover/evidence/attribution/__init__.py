"""Attribution: which parts of a perturbation, and which parts of the model, carry a recovery.

Read `parts` first: it splits a perturbation by SAE feature and error, replays each part and knocks it out. `paths`
follows the effect through heads and MLPs, `movers` finds the heads that attend to the target and write it, and
`linear_error` fits the part of the SAE's error that is linear in the residual.
"""

from recover.evidence.attribution.linear_error import (
    LinearError,
    error_activations,
    fit_linear_error,
    fit_linear_errors,
)
from recover.evidence.attribution.movers import Movers, looks, name_movers, undefended, writes
from recover.evidence.attribution.parts import (
    POINTS,
    TOP_K,
    VIEWS,
    Attribution,
    Parts,
    View,
    attribute,
    entering,
    parts_of,
)
from recover.evidence.attribution.paths import (
    Carrier,
    Direct,
    Trace,
    carriers,
    direct,
    patched,
    put_back,
    put_in,
    through,
    trace,
)
from recover.evidence.attribution.ranking import Carried, carried

__all__ = [
    "POINTS",
    "TOP_K",
    "VIEWS",
    "Attribution",
    "Carried",
    "Carrier",
    "Direct",
    "LinearError",
    "Movers",
    "Parts",
    "Trace",
    "View",
    "attribute",
    "carried",
    "carriers",
    "direct",
    "entering",
    "error_activations",
    "fit_linear_error",
    "fit_linear_errors",
    "looks",
    "name_movers",
    "parts_of",
    "patched",
    "put_back",
    "put_in",
    "through",
    "trace",
    "undefended",
    "writes",
]
