"""What pytest loads wherever recover is installed: options, markers, the fixture `check_defense`, a table at the end.

It stands beside the package and imports it where a test first asks for it, not before: a session that checks no defense
does not wait for torch, and nnsight, which gives every object a method `save`, comes after the other plugins, one of
which (anyio's) cannot be loaded once it has. What checks and asserts is `recover.testing`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from recover.testing.defenses import Defenses

MARKERS = {
    "gpu": "needs a CUDA device",
    "hub": "needs the Hugging Face hub",
    "slow": "takes long",
}
OTHERS = r"(transformer_lens|sae_lens|nnsight|transformers|torch)(\..*)?"
"""What these say of each other is no news to who tests a defense, and no error where warnings are errors."""
RUNS = pytest.StashKey[dict[str, dict[str, Any]]]()
FOLDER = pytest.StashKey[Path]()
"""Of the test that runs."""
MACHINE = pytest.StashKey[dict[str, bool]]()


@pytest.fixture(scope="session")
def check_defense(request: pytest.FixtureRequest) -> Defenses:
    """Check a defense once, and remember it: `check_defense("defense.yaml")` gives what the assertions read."""
    from recover.testing.defenses import Defenses

    config = request.config
    given = config.getoption("recovery_dir")
    folder = config.invocation_params.dir / given if given else config.rootpath / ".recover"
    if given is None and config.cache is not None:
        folder = config.cache.mkdir("recover")
    return Defenses(
        folder,
        config.getoption("recovery_seeds"),
        config.stash[RUNS],
        beside=lambda: config.stash[FOLDER],
        aloud=lambda: _aloud(config),
    )


@contextlib.contextmanager
def _aloud(config: pytest.Config) -> Iterator[bool]:
    """What is written here is not captured, unless this is a worker of xdist, which has nobody to tell."""
    capturing = config.pluginmanager.getplugin("capturemanager")
    if hasattr(config, "workerinput") or capturing is None:
        yield False
        return
    with capturing.global_and_fixture_disabled():
        yield True


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("recover", "recovery of suppressed behaviors")
    group.addoption("--recovery-json", type=Path, metavar="FILE", help="write the verdicts of all checks there")
    group.addoption("--recovery-report", type=Path, metavar="DIR", help="keep a report of each check there")
    group.addoption("--recovery-seeds", type=_count, default=1, metavar="N", help="control seeds of each check")
    group.addoption("--recovery-dir", type=Path, metavar="DIR", help="where runs are kept (default: pytest's cache)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUNS], config.stash[MACHINE] = {}, {}
    for name, why in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {why}")
    config.addinivalue_line("filterwarnings", f"ignore::DeprecationWarning:{OTHERS}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    item.config.stash[FOLDER] = item.path.parent
    return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name, there in (("gpu", _has_gpu), ("hub", _has_hub)):
        if item.get_closest_marker(name) is not None:
            known = item.config.stash[MACHINE]
            if name not in known:
                known[name] = there()
            if not known[name]:
                pytest.skip(MARKERS[name])


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_hub() -> bool:
    from recover.models.hub import hub_reachable

    return hub_reachable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    runs, output = session.config.stash[RUNS], getattr(session.config, "workeroutput", None)
    if output is not None:
        output["recover"] = json.dumps(runs)  # a worker of xdist: the controller tells of all
        return
    here, told = session.config.invocation_params.dir, sorted(runs.items())
    if (path := session.config.getoption("recovery_json")) is not None:
        path = here / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([{"folder": folder, **one} for folder, one in told], indent=1) + "\n")
    if (kept := session.config.getoption("recovery_report")) is not None:
        for folder, _ in told:
            target = here / kept / Path(folder).name
            target.mkdir(parents=True, exist_ok=True)
            for name in ("verdict.json", "report.html", "report.md"):
                if (Path(folder) / name).is_file():
                    shutil.copy(Path(folder) / name, target / name)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    """What a worker of xdist checked."""
    node.config.stash[RUNS].update(json.loads(getattr(node, "workeroutput", {}).get("recover", "{}")))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not (runs := config.stash[RUNS]):
        return
    rows = [("defense", "seed", "verdict", "brought back", "content", "artifacts")]
    for folder, one in sorted(runs.items(), key=lambda pair: (pair[1]["name"], _seed(pair[1]))):
        found = one["recovery"]
        rate = f"{found['recovered']} of {found['searched']} at {found['budget']:g}" if found["searched"] else "-"
        content = str(one["content"]).lower() if one["verdict"] == "RECOVERABLE" else "-"
        rows.append((one["name"], str(_seed(one)), one["verdict"], rate, content, _from(config, folder)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("recovery")
    for row in rows:
        terminalreporter.write_line(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        )


def _seed(verdict: dict[str, Any]) -> int:
    return int(verdict.get("provenance", {}).get("control_seed", 0))


def _from(config: pytest.Config, folder: str) -> str:
    """As it is named from where pytest was started, where that is above it."""
    here = config.invocation_params.dir
    return os.path.relpath(folder, here) if Path(folder).is_relative_to(here) else folder
