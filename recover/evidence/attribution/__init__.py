"""What carries a recovery: attribution of a found perturbation's effect to features, the SAE's error, heads and MLPs.

Read `parts` first: it splits the effect between clamped features, other features and the error. `paths` and `movers`
follow the effect through attention heads and MLPs; `linear_error` predicts the error from the residual.
"""

from recover.evidence.attribution.linear_error import LinearError, error_activations, fit_linear_error
from recover.evidence.attribution.movers import looks, undefended, writes
from recover.evidence.attribution.parts import POINTS, TOP_K, VIEWS, Attribution, attribute, entering, parts_of
from recover.evidence.attribution.paths import Carrier, carriers, direct, patched, through, trace

__all__ = [
    "POINTS",
    "TOP_K",
    "VIEWS",
    "Attribution",
    "Carrier",
    "LinearError",
    "attribute",
    "carriers",
    "direct",
    "entering",
    "error_activations",
    "fit_linear_error",
    "looks",
    "parts_of",
    "patched",
    "through",
    "trace",
    "undefended",
    "writes",
]
