"""Attribution: which parts of a perturbation, and which parts of the model, carry a recovery.

Read `parts` first: it splits a perturbation by SAE feature and error, replays each part and knocks it out. `paths`
follows the effect through heads and MLPs, `movers` finds the heads that attend to the target and write it, and
`linear_error` fits the part of the SAE's error that is linear in the residual.
"""

from recover.evidence.attribution.linear_error import LinearError, fit_linear_errors
from recover.evidence.attribution.movers import looks, name_movers, undefended, writes
from recover.evidence.attribution.parts import POINTS, TOP_K, VIEWS, Attribution, Parts, attribute, entering
from recover.evidence.attribution.paths import direct, through, trace
from recover.evidence.attribution.ranking import carried

__all__ = [
    "POINTS",
    "TOP_K",
    "VIEWS",
    "Attribution",
    "LinearError",
    "Parts",
    "attribute",
    "carried",
    "direct",
    "entering",
    "fit_linear_errors",
    "looks",
    "name_movers",
    "through",
    "trace",
    "undefended",
    "writes",
]
