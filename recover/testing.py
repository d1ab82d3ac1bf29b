"""A pytest plugin: defenses kept as tests.

    def test_the_defense_holds(check_defense):
        checked = check_defense("defense.yaml")
        assert_not_recovered(checked, budget=10)

1. *Check*: the fixture `check_defense` runs `recover check` on a DEFENSE.yaml, or `recover.check` on objects.
2. *Cache*: a run's folder is named by a hash of all that it depends on, in pytest's cache (`--recovery-dir`). Several
   assertions cost one search, a later session none, and one that was interrupted goes on. Workers of xdist wait for
   each other where they need the same run.
3. *Seeds*: with `--recovery-seeds N` each check is run with N control seeds, and assertions must hold in all of them.
4. *Assertions* read the verdict; one that fails names the figure, the bound and the folder of the artifacts.

After the tests a table says what was checked; `--recovery-json FILE` writes the verdicts, `--recovery-report DIR` keeps
a report of each. Markers `gpu` and `hub` skip with a reason where there is no CUDA device or no Hugging Face hub.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from recover.artifacts import EXAMPLES, MARKDOWN, REPORT, VERDICT, write_whole
from recover.clamp import Defense
from recover.config import Config, load_config
from recover.examples import Examples
from recover.model import Model
from recover.objects import check_objects
from recover.runner import run_check
from recover.types import InputError

__all__ = [
    "Checked",
    "Defenses",
    "assert_attribution",
    "assert_drift_below",
    "assert_not_recovered",
    "assert_recoverable",
    "assert_specific",
]

BELIEVED = ("RECOVERABLE", "NOT_RECOVERED_AT_BUDGET")
MARKERS = {
    "gpu": "needs a CUDA device",
    "hub": "needs the Hugging Face hub",
    "slow": "takes long",
}
RUNS = pytest.StashKey[dict[str, dict[str, Any]]]()


@dataclass(frozen=True)
class Checked:
    """What checks of one defense found, one for each seed.

    Attributes:
        name: of the DEFENSE.yaml, or as it was given.
        verdicts: as `verdict.json` has them.
        folders: their artifacts.
    """

    name: str
    verdicts: tuple[Mapping[str, Any], ...]
    folders: tuple[Path, ...]

    @property
    def verdict(self) -> Mapping[str, Any]:
        """That of the first seed."""
        return self.verdicts[0]

    def __iter__(self) -> Any:
        return zip(self.verdicts, self.folders, strict=True)


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
        configs = [_with_seed(config, config.controls.seed + number) for number in range(self.seeds)]
        return self._remembered(name, [self._of_file(name, one) for one in configs])

    def _of_file(self, name: str, config: Config) -> tuple[dict[str, Any], Path]:
        folder = self.folder / f"{Path(name).stem}-{config.fingerprint(**_files(config))[:16]}"
        if str(folder) in self.runs:
            return self.runs[str(folder)], folder
        with _alone(folder):
            try:
                return run_check(config, folder), folder
            except InputError as error:
                if "holds a run of this configuration with other" not in str(error):
                    raise
                shutil.rmtree(folder)  # other weights under the same name, or another version: ours to make again
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


def assert_recoverable(checked: Checked, at_least: float = 0.0) -> None:
    """The defense is recoverable, on more than `at_least` of the valid flips where that is given."""
    for verdict, folder in checked:
        _believed(verdict, folder, "RECOVERABLE")
        found = verdict["recovery"]
        if verdict["verdict"] != "RECOVERABLE" or found["rate"] < at_least:
            _fail(f"{_rate(found)}; expected {f'at least {at_least:.0%}' if at_least else 'some'}", verdict, folder)


def assert_not_recovered(checked: Checked, budget: float | None = None) -> None:
    """No valid flip is brought back by a perturbation of norm at most `budget`, by default the one that was searched.

    Holds where the search says so that it was to be believed; a run that says nothing fails.
    """
    for verdict, folder in checked:
        _believed(verdict, folder, "NOT_RECOVERED_AT_BUDGET")
        found = verdict["recovery"]
        bound = found["budget"] if budget is None else budget
        if bound > found["budget"]:
            _fail(
                f"searched to a norm of {found['budget']:g} only; expected none recovered at {bound:g}", verdict, folder
            )
        sizes = [] if verdict["verdict"] == "NOT_RECOVERED_AT_BUDGET" else _sizes(folder)
        if back := [size for size in sizes if size <= bound]:
            _fail(
                f"{len(back)} of {found['searched']} valid flips are brought back by a perturbation of norm at most "
                f"{bound:g}, the smallest of norm {min(back):.3g}; expected none",
                verdict,
                folder,
            )


def assert_specific(checked: Checked, expected: bool = True) -> None:
    """What was found is specific to the behavior; or, with `expected=False`, it is known not to be."""
    for verdict, folder in checked:
        _believed(verdict, folder, "RECOVERABLE")
        if verdict["verdict"] != "RECOVERABLE" or verdict["specific"] is not expected:
            _fail(f"specific is {verdict['specific']}; expected {expected}", verdict, folder)


def assert_drift_below(checked: Checked, bound: float) -> None:
    """The clamped features moved by at most this share of their size on every valid flip, and some were searched."""
    for verdict, folder in checked:
        _believed(verdict, folder, "RECOVERABLE")
        drifts = [one["certificate"]["relative_drift"] for one in _certified(folder)]
        worst = max(drifts, default=None)
        if worst is None or not worst <= bound:
            shown = "no certificate" if worst is None else f"a relative drift of {worst:.2e}"
            _fail(f"{shown}; expected at most {bound:g}", verdict, folder)


def assert_attribution(checked: Checked, part: str, at_least: float) -> None:
    """Replaying this part of the perturbations alone brings the behavior back at this rate or more."""
    for verdict, folder in checked:
        _believed(verdict, folder, "RECOVERABLE")
        parts = (verdict.get("attribution") or {}).get("parts", {})
        if part not in parts:
            known = f"it has: {', '.join(parts)}" if parts else "this run has none"
            _fail(f"no part {part!r} in its attribution; {known}", verdict, folder)
        rate = parts[part]["replay"]["rate"]
        if rate < at_least:
            _fail(f"replay of {part} alone brings back {rate:.0%}; expected at least {at_least:.0%}", verdict, folder)


def _believed(verdict: Mapping[str, Any], folder: Path, expected: str) -> None:
    if verdict["verdict"] not in BELIEVED:
        _fail(
            f"the run says nothing either way ({'; '.join(verdict['reasons'])}); expected {expected}", verdict, folder
        )


def _fail(what: str, verdict: Mapping[str, Any], folder: Path) -> None:
    __tracebackhide__ = True
    pytest.fail(f"{verdict['verdict']}: {what}\nartifacts: {folder}", pytrace=False)


def _rate(found: Mapping[str, Any]) -> str:
    low, high = found["wilson95"]
    rate = f"{found['recovered']} of {found['searched']} valid flips recovered ({found['rate']:.0%}; 95% interval "
    return f"{rate}{low:.0%} to {high:.0%}) at budget {found['budget']:g}"


def _certified(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / EXAMPLES).read_text(encoding="utf-8").splitlines()
    return [one for one in map(json.loads, lines) if one.get("certificate") is not None]


def _sizes(folder: Path) -> list[float]:
    """The norms of the certified perturbations that brought the behavior back, the smaller one of each example."""
    sizes = []
    for one in _certified(folder):
        found = [one["certificate"], one["smallest"]]
        back = [facts["norm"] for facts in found if facts and facts["shows"] and facts["held"]]
        sizes += [min(back)] if back else []
    return sizes


def _with_seed(config: Config, seed: int) -> Config:
    return config.model_copy(update={"controls": config.controls.model_copy(update={"seed": seed})})


def _files(config: Config) -> dict[str, str]:
    """Hashes of what the configuration names by path and its run would not notice before it is loaded."""
    path = config.prompts.file
    return (
        {}
        if path is None or not Path(path).is_file()
        else {"file": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
    )


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
    group.addoption("--recovery-seeds", type=_positive, default=1, metavar="N", help="control seeds of each check")
    group.addoption("--recovery-dir", type=Path, metavar="DIR", help="where runs are kept (default: pytest's cache)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUNS] = {}
    for name, why in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {why}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, there in (("gpu", has_cuda), ("hub", has_hub)):
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


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{text!r} is not a whole number from 1")
    return int(text)


@cache
def has_cuda() -> bool:
    """Whether there is a CUDA device."""
    import torch

    return torch.cuda.is_available()


@cache
def has_hub() -> bool:
    """Whether the Hugging Face hub answers."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info("gpt2", timeout=5)
    except Exception:  # no network, a proxy, a refusal: all mean that it is not there
        return False
    return True
