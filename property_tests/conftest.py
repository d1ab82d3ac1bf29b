"""How hard the laws are tried: HYPOTHESIS_PROFILE is `ci` (the default) or `thorough`.

`ci` draws the same examples every time, so that a failure is of the change at hand; `thorough` draws new ones, at least
1,000 a law, and keeps what failed.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

PATIENT = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=40, derandomize=True, database=None, **PATIENT)
# For `mutations.py`: that a law fails is all that is asked.
settings.register_profile("bite", settings.get_profile("ci"), phases=[Phase.generate])
settings.register_profile("thorough", max_examples=1000, **PATIENT)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
