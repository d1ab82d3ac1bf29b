"""A pytest plugin: defenses kept as tests.

    def test_the_defense_holds(check_defense):
        checked = check_defense("defense.yaml")
        assert_not_recovered(checked, budget=10)

1. *Check*: the fixture `check_defense` runs `recover check` on a DEFENSE.yaml, or `recover.check` on objects.
2. *Cache*: a run's folder is named by a hash of all that it depends on, in pytest's cache (`--recovery-dir`). Several
   assertions cost one search, a later session none, and one that was interrupted goes on. Workers of xdist wait for
   each other where they need the same run.
3. *Seeds*: with `--recovery-seeds N` each check is run with N control seeds, and assertions must hold in all of them.
4. *Assertions* (`assertions`) read the verdict; one that fails names the figure, the bound and the folder.

After the tests a table says what was checked; `--recovery-json FILE` writes the verdicts, `--recovery-report DIR` keeps
a report of each. Markers `gpu` and `hub` skip with a reason where there is no CUDA device or no Hugging Face hub.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from recover.artifacts import MARKDOWN, REPORT, VERDICT, write_whole
from recover.assertions import (
    Checked,
    assert_attribution,
    assert_drift_below,
    assert_not_recovered,
    assert_recoverable,
    assert_specific,
)
from recover.clamp import Defense
from recover.cli import positive
from recover.config import Config, load_config
from recover.examples import Examples
from recover.model import Model
from recover.objects import check_objects
from recover.runner import OtherRunError, run_check
from recover.zoo import hub_reachable

__all__ = [
    "Checked",
    "Defenses",
    "assert_attribution",
    "assert_drift_below",
    "assert_not_recovered",
    "assert_recoverable",
    "assert_specific",
]

MARKERS = {
    "gpu": "needs a CUDA device",
    "hub": "needs the Hugging Face hub",
    "slow": "takes long",
}
RUNS = pytest.StashKey[dict[str, dict[str, Any]]]()


class Defenses:
    """Runs checks and remembers them: what `check_defense` is.

    Args:
        folder: where runs are kept.
        seeds: control seeds of each.
        runs: verdicts of this session by folder, for the table at its end.
    """

    def __init__(self, folder: Path, seeds: int, runs: dict[str, dict[str, Any]]) -> None:
        self.folder, self.seeds, self.runs = folder, seeds, runs

    def __call__(self, defense: Path | str | Defense, **options: Any) -> Checked:
        """Check a defense; a check that was done before is not done again.

        Args:
            defense: a DEFENSE.yaml, or a `Defense`.
            **options: of a file, what overrides it by dotted key, such as `**{"search.budget": 5.0}`; of a `Defense`,
                the arguments of `recover.check`, `model=`, `examples=`, `budget=` and so on, and `name=`.

        Raises:
            InputError: it cannot be used; one line.
        """
        if isinstance(defense, Defense):
            return self._objects(defense, **options)
        name, config = Path(defense).name, load_config(defense, options)
        configs = [config.with_control_seed(config.controls.seed + number) for number in range(self.seeds)]
        return self._remembered(name, [self._of_file(name, one) for one in configs])

    def _of_file(self, name: str, config: Config) -> tuple[dict[str, Any], Path]:
        folder = self.folder / f"{Path(name).stem}-{config.fingerprint()[:16]}"
        if str(folder) in self.runs:
            return self.runs[str(folder)], folder
        with _alone(folder):
            try:
                return run_check(config, folder), folder
            except OtherRunError:
                shutil.rmtree(folder)  # of other weights or prompts under the same names: ours to make again
                return run_check(config, folder), folder

    def _objects(
        self, defense: Defense, *, model: Model, examples: Examples, name: str = "", **options: Any
    ) -> Checked:
        found = []
        for seed in range(self.seeds):
            folder, run = check_objects(self.folder, model, defense, examples, seed=seed, **options)
            if str(folder) in self.runs:
                found.append((self.runs[str(folder)], folder))
                continue
            with _alone(folder):
                found.append((run(), folder))
        return self._remembered(name or "objects", found)

    def _remembered(self, name: str, found: Sequence[tuple[dict[str, Any], Path]]) -> Checked:
        for verdict, folder in found:
            self.runs[str(folder)] = {**verdict, "name": name}
        verdicts, folders = zip(*found, strict=True)
        return Checked(name, verdicts, folders)


def _alone(folder: Path) -> FileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


@pytest.fixture(scope="session")
def check_defense(request: pytest.FixtureRequest) -> Defenses:
    """Check a defense once, and remember it: `check_defense("defense.yaml")` gives what the assertions read."""
    config = request.config
    given = config.getoption("recovery_dir")
    folder = Path(given) if given else config.rootpath / ".recover"
    if given is None and config.cache is not None:
        folder = config.cache.mkdir("recover")
    return Defenses(folder, config.getoption("recovery_seeds"), config.stash[RUNS])


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("recover", "recovery of suppressed behaviors")
    group.addoption("--recovery-json", type=Path, metavar="FILE", help="write the verdicts of all checks there")
    group.addoption("--recovery-report", type=Path, metavar="DIR", help="keep a report of each check there")
    group.addoption("--recovery-seeds", type=positive, default=1, metavar="N", help="control seeds of each check")
    group.addoption("--recovery-dir", type=Path, metavar="DIR", help="where runs are kept (default: pytest's cache)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUNS] = {}
    for name, why in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {why}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, there in (("gpu", torch.cuda.is_available), ("hub", hub_reachable)):
        if item.get_closest_marker(name) is not None and not there():
            pytest.skip(MARKERS[name])


def pytest_sessionfinish(session: pytest.Session) -> None:
    runs, output = session.config.stash[RUNS], getattr(session.config, "workeroutput", None)
    if output is not None:
        output["recover"] = json.dumps(runs)  # a worker of xdist: the controller tells of all
        return
    told = sorted(runs.items())
    if (path := session.config.getoption("recovery_json")) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps([{"folder": folder, **one} for folder, one in told], indent=1) + "\n").encode())
    if (kept := session.config.getoption("recovery_report")) is not None:
        for folder, _ in told:
            target = kept / Path(folder).name
            target.mkdir(parents=True, exist_ok=True)
            for name in (VERDICT, REPORT, MARKDOWN):
                if (Path(folder) / name).is_file():
                    shutil.copy(Path(folder) / name, target / name)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """What a worker of xdist checked."""
    node.config.stash[RUNS].update(json.loads(getattr(node, "workeroutput", {}).get("recover", "{}")))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not (runs := config.stash[RUNS]):
        return
    terminalreporter.section("recovery")
    for folder, one in sorted(runs.items()):
        found = one["recovery"]
        rate = f"{found['recovered']}/{found['searched']} at {found['budget']:g}" if found["searched"] else "-"
        specific = f", specific: {one['specific']}" if one["verdict"] == "RECOVERABLE" else ""
        terminalreporter.write_line(f"{one['name']:24} {one['verdict']:24} {rate:>14}{specific}  {folder}")
