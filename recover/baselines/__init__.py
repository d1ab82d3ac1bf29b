"""What others published, as it was published, to compare with. Read `probes` first.

=============  ==========================================================================================
`probes`       the published search over several sites: random probes of the row space, then corrections
`two_stage`    the published search for answers: first their opening, then the whole of them
`soft_suffix`  vectors appended to the prompt in place of tokens
`tpp`          SAEBench's targeted probe perturbation
=============  ==========================================================================================
"""

from recover.baselines.class_scoring import ClassScores, class_scores
from recover.baselines.probes import find_probed
from recover.baselines.published_loops import PublishedAnswerLoop, published_loop
from recover.baselines.soft_suffix import SoftSuffix, spoken_with, with_room
from recover.baselines.tpp import Score, ablated, effect, score
from recover.baselines.two_stage import OPENING_STEPS, Opening, opened

__all__ = [
    "OPENING_STEPS",
    "ClassScores",
    "Opening",
    "PublishedAnswerLoop",
    "Score",
    "SoftSuffix",
    "ablated",
    "class_scores",
    "effect",
    "find_probed",
    "opened",
    "published_loop",
    "score",
    "spoken_with",
    "with_room",
]
