"""Defenses kept as tests: the fixture `check_defense` and the assertions."""

from recover.testing.assertions import (
    Checked,
    assert_attribution,
    assert_content,
    assert_drift_below,
    assert_not_recovered,
    assert_recoverable,
    assert_rule,
)
from recover.testing.defenses import Defenses

__all__ = [
    "Checked",
    "Defenses",
    "assert_attribution",
    "assert_content",
    "assert_drift_below",
    "assert_not_recovered",
    "assert_recoverable",
    "assert_rule",
]

pytest_plugins = ["recover_pytest"]
"""So that `-p recover.testing` loads the plugin where the package is on the path and not installed."""
