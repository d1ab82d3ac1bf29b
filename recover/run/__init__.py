"""Runs on disk: from DEFENSE.yaml, or from objects in memory, to a folder of artifacts.

Read `runner` first: `run_check` is what `recover check` calls. `config` reads and validates DEFENSE.yaml, `setting`
loads what it names, and `objects` stands in its place for a model and a defense in memory. `progress` shows how far a
run is.
"""

from recover.run.config import ClampConfig, Config, PromptConfig, SearchConfig, Selection, load_config
from recover.run.objects import Objects, content_hash
from recover.run.points import Points
from recover.run.progress import shown
from recover.run.reopened import SavedRun, SharedDelta, load_run
from recover.run.runner import OtherRunError, beside_published, run_check, run_seeds, run_source
from recover.run.setting import (
    Chosen,
    Setting,
    build_bench,
    choose_features,
    load_setting,
    package_versions,
)

__all__ = [
    "Chosen",
    "ClampConfig",
    "Config",
    "Objects",
    "OtherRunError",
    "Points",
    "PromptConfig",
    "SavedRun",
    "SearchConfig",
    "Selection",
    "Setting",
    "SharedDelta",
    "beside_published",
    "build_bench",
    "choose_features",
    "content_hash",
    "load_config",
    "load_run",
    "load_setting",
    "package_versions",
    "run_check",
    "run_seeds",
    "run_source",
    "shown",
]
