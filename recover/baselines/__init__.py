"""To be described."""

from recover.baselines.class_scores import class_scores
from recover.baselines.probes import find_probed
from recover.baselines.published_loop import PublishedAnswerLoop, published_loop
from recover.baselines.soft_suffix import SoftSuffix
from recover.baselines.two_stage import Opening, opened

__all__ = ["Opening", "PublishedAnswerLoop", "SoftSuffix", "class_scores", "find_probed", "opened", "published_loop"]
