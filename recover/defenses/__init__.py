"""Defenses: clamps on SAE features, the model under them, and how features are selected.

Read `clamps` first: a `Defense` is a tuple of clamps. `defended` puts one into a model and gives the objective of a
search. `speech` lets the defended model generate text, `selection` chooses features, and `utility` measures what a
defense costs on ordinary text.
"""

from recover.defenses.clamps import Clamp, Defense, Floor, Mode, Scale, Set
from recover.defenses.defended import Defended, check_fits, clamp_edits, defend
from recover.defenses.selection import (
    attributions,
    contrast,
    effects,
    firing_rates,
    forgettable,
    largest,
    matched,
    mean_activations,
    select_features,
)
from recover.defenses.speech import say, under
from recover.defenses.utility import Utility, measure_utility

__all__ = [
    "Clamp",
    "Defended",
    "Defense",
    "Floor",
    "Mode",
    "Scale",
    "Set",
    "Utility",
    "attributions",
    "check_fits",
    "clamp_edits",
    "contrast",
    "defend",
    "effects",
    "firing_rates",
    "forgettable",
    "largest",
    "matched",
    "mean_activations",
    "measure_utility",
    "say",
    "select_features",
    "under",
]
