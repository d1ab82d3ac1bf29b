"""To be described."""

from recover.run.config import Config, Selection, load_config
from recover.run.points import Points
from recover.run.progress import shown as progress_shown
from recover.run.setting import Setting, build_bench, load_setting, package_versions

__all__ = [
    "Config",
    "Points",
    "Selection",
    "Setting",
    "build_bench",
    "load_config",
    "load_setting",
    "package_versions",
    "progress_shown",
]
