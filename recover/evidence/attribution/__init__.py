"""Attribution: which parts of a perturbation, and which parts of the model, carry a recovery.

Read `parts` first: it splits a perturbation by SAE feature and error, replays each part and knocks it out. `paths`
follows the effect through heads and MLPs, `movers` finds the heads that attend to the target and write it, and
`linear_error` fits the part of the SAE's error that is linear in the residual.
"""

from recover.evidence.attribution.linear_error import LinearError, fit_linear_errors
from recover.evidence.attribution.movers import name_movers
from recover.evidence.attribution.parts import POINTS, TOP_K, VIEWS, Attribution, View, attribute, entering, parts_of
from recover.evidence.attribution.ranking import carried

__all__ = [
    "POINTS",
    "TOP_K",
    "VIEWS",
    "Attribution",
    "LinearError",
    "View",
    "attribute",
    "carried",
    "entering",
    "fit_linear_errors",
    "name_movers",
    "parts_of",
]
