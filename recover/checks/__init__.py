"""Laws that a user's model and SAE must keep before a check means anything: `recover verify`.

Read `verification` first: it lists the laws and says which protocols they support. `laws` measures each law, on the
model, SAE and prompts that `law_bench` sets up.
"""

from recover.checks.law_bench import Law
from recover.checks.laws import LAWS
from recover.checks.verification import Support, fitting, stand_in, supported, told, verify

__all__ = ["LAWS", "Law", "Support", "fitting", "stand_in", "supported", "told", "verify"]
