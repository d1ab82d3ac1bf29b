"""To be described."""

from recover.run.config import Config, Selection, load_config
from recover.run.points import Points
from recover.run.progress import shown as progress_shown
from recover.run.reopened import SavedRun, load_run
from recover.run.runner import run_check
from recover.run.setting import Setting, build_bench, load_setting, package_versions

__all__ = [
    "Config",
    "Points",
    "SavedRun",
    "Selection",
    "Setting",
    "build_bench",
    "load_config",
    "load_run",
    "load_setting",
    "package_versions",
    "progress_shown",
    "run_check",
]
