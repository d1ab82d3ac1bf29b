"""Planted worlds: small models with a defense whose correct verdict is known by construction.

Each world is a function of a seed and of sizes; `KINDS` and `MIXTURES` name them. Read `world` first: it describes what
worlds are made of. Each other module derives the correct verdict of its kind at its top, and `selftest` runs the whole
check on them (`recover selftest`). `tables` draws tables of readings without any model, to count how often rules err.
"""

from recover.planted.kinds import KINDS, MIXTURES
from recover.planted.selftest import Outcome, run_selftest
from recover.planted.tables import TABLES, TableWorld, drawn_table
from recover.planted.world import Planted

__all__ = ["KINDS", "MIXTURES", "TABLES", "Outcome", "Planted", "TableWorld", "drawn_table", "run_selftest"]
