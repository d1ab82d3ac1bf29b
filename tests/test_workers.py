"""Workers that share a check: who does what, that all learn all of it, and real processes, one of which is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch

from recover.cli import main
from recover.protocol.folder import DELTAS, EXAMPLES, RUN, UNITS, VERDICT, RunFolder
from recover.protocol.ledger import InMemoryStore, Ledger, Part
from recover.protocol.phases import Done
from recover.protocol.workers import ALONE, Workers
from recover.run import runner, setting
from recover.run.config import load_config
from recover.run.runner import run_check
from recover.tasks import load_examples
from recover.types import InputError

N, BATCH = 24, 6


@dataclass(frozen=True)
class Threads(Workers):
    """Workers that are threads of this process."""

    table: dict[int, Any] = field(default_factory=dict)
    barrier: Any = None

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.barrier.wait(timeout=600)
        told = [self.table[rank] for rank in range(self.size)]
        self.barrier.wait(timeout=600)
        return told


def in_threads(size: int, work: Any) -> list[Any]:
    """What `work(workers)` gives in each, or what it raises."""
    table, barrier, given = {}, threading.Barrier(size), [None] * size

    def one(rank: int) -> None:
        try:
            given[rank] = work(Threads(rank, size, table, barrier))
        except (InputError, SystemExit) as error:
            given[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), name=f"{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


PARTS: dict[Part, list[str]] = {("batch", number): [f"search/{number}"] for number in range(5)}


def test_what_is_left_is_dealt_out_and_nothing_twice() -> None:
    for size in (1, 2, 3, 7):
        store = InMemoryStore()
        store.keep("search/1", {}, {})
        shares = [Ledger(store, Workers(rank, size)).mine(PARTS) for rank in range(size)]
        assert sorted(part for share in shares for part in share) == [("batch", number) for number in (0, 2, 3, 4)]
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_each_learns_what_the_others_finished() -> None:
    ran: list[int] = []

    def work(workers: Workers) -> InMemoryStore:
        store = InMemoryStore()
        ledger = Ledger(store, workers)
        with ledger.shared():
            for _, number in sorted(ledger.mine(PARTS)):

                def unit(number: int = number) -> Done:
                    ran.append(number)
                    return Done({f"e{number}": {"found": number}}, {f"e{number}": torch.full((1, 3), float(number))})

                ledger.run("search", number, unit)
        assert ledger.mine(PARTS) == set()
        for number in range(5):
            assert ledger.values("search", number) == {f"e{number}": {"found": number}}
            assert torch.equal(store.delta(f"e{number}"), torch.full((1, 3), float(number)))
        return store

    stores = in_threads(2, work)
    assert all(isinstance(store, InMemoryStore) for store in stores)
    assert sorted(ran) == list(range(5))
    assert stores[0].units == {name: stores[1].units[name] for name in stores[0].units}


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_of_what_stops_one_worker_one_tells_and_none_goes_on(refused: int) -> None:
    def work(workers: Workers) -> None:
        with workers.together():
            if workers.rank == refused:
                raise InputError("no such file")

    given = in_threads(3, work)
    assert isinstance(given[0], InputError)
    assert str(given[0]) == ("no such file" if refused == 0 else f"worker {refused}: no such file")
    assert [getattr(one, "code", None) for one in given[1:]] == [2, 2]


@pytest.mark.parametrize("refused", [0, 1, 2])
def test_what_stops_one_in_a_stage_is_told_when_the_others_are_done(refused: int) -> None:
    stores = [InMemoryStore(), InMemoryStore(), InMemoryStore()]

    def work(workers: Workers) -> None:
        ledger = Ledger(stores[workers.rank], workers)
        with ledger.shared():
            if workers.rank == refused:
                raise InputError("disk full")
            for _, number in ledger.mine(PARTS):
                ledger.run("search", number, dict)

    given = in_threads(3, work)
    assert str(given[0]) == ("disk full" if refused == 0 else f"worker {refused}: disk full")
    assert [getattr(one, "code", None) for one in given[1:]] == [2, 2]
    assert [bool(store.units) for store in stores] == [rank != refused for rank in range(3)]


def test_one_alone_is_told_of_its_own_error_and_needs_nobody() -> None:
    with pytest.raises(InputError, match=r"^mine$"), ALONE.together():
        raise InputError("mine")
    assert (ALONE.gather(3), ALONE.led(4), ALONE.leads, ALONE.deal([1, 2])) == ([3], 4, True, [1, 2])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, its SAEs and `defense.yaml`."""
    return tiny.make(tmp_path_factory.mktemp("tiny"))


def arguments(root: Path, out: Path) -> list[str]:
    return ["check", f"{root / 'defense.yaml'}", "--out", f"{out}", "--n", f"{N}", "--batch-size", f"{BATCH}"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device_map": "auto", "device": "auto"}, "device_map: it spreads one model over all cards"),
        (
            {"device": "cuda:0"},
            "device: cuda:0 is one card, and under torchrun each worker has one of its own; write",
        ),
    ],
)
def test_workers_have_a_card_each(root: Path, tmp_path: Path, changes: dict[str, str], said: str) -> None:
    config = load_config(root / "defense.yaml", changes)
    given = in_threads(2, lambda workers: run_check(config, tmp_path / "out", workers=workers))
    assert isinstance(given[0], InputError)
    assert str(given[0]).startswith(said)


def test_a_model_is_in_one_place(root: Path) -> None:
    with pytest.raises(InputError, match=r"flags: device_map: it says where the model is, and so does device"):
        load_config(root / "defense.yaml", {"device_map": "auto", "device": "cpu"})


@pytest.mark.parametrize(("asked", "used"), [("auto", 1), (3, 3)])
def test_what_a_task_computes_does_not_hang_on_the_cores(
    root: Path, monkeypatch: pytest.MonkeyPatch, asked: str | int, used: int
) -> None:
    seen: list[int] = []

    def asks(*given: Any, **named: Any) -> Any:
        seen.append(torch.get_num_threads())
        return load_examples(*given, **named)

    monkeypatch.setattr(setting, "load_examples", asks)
    with setting.threads(2):
        setting.load_setting(load_config(root / "defense.yaml", {"threads": asked}))
        assert (seen, torch.get_num_threads()) == ([used], 2)


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are threads load in turn: while transformers loads, it changes its own classes for all threads."""
    lock, load = threading.Lock(), runner.load_setting

    def in_turn(*given: Any, **named: Any) -> Any:
        with lock:
            return load(*given, **named)

    monkeypatch.setattr(runner, "load_setting", in_turn)


@pytest.mark.usefixtures("one_at_a_time")
def test_a_batch_is_what_fits_the_worker_with_least_memory(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise InputError("far enough")

    monkeypatch.setattr(runner, "_check", stopped)
    fitting = {"0": 7, "1": 4, "2": 9}
    monkeypatch.setattr(setting.Setting, "batch_size", property(lambda _: fitting[threading.current_thread().name]))
    config = load_config(root / "defense.yaml", {"prompts.n": 8})
    in_threads(3, lambda workers: run_check(config, tmp_path / "out", workers=workers))
    assert json.loads((tmp_path / "out" / RUN).read_text())["batch_size"] == 4


@pytest.fixture(scope="module")
def alone(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(arguments(root, out)) == 0
    return out


@pytest.mark.usefixtures("one_at_a_time")
def test_no_worker_says_that_it_is_done_before_all_is_written(
    root: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: RunFolder, name: str, content: bytes) -> None:
        raise InputError(f"{name} cannot be written")

    shutil.copytree(alone, out := tmp_path / "out")
    monkeypatch.setattr(RunFolder, "write", full)
    config = load_config(root / "defense.yaml", {"prompts.n": N})
    given = in_threads(2, lambda workers: run_check(config, out, workers=workers))
    assert isinstance(given[0], InputError)
    assert isinstance(given[1], SystemExit)


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def launch(*command: str, program: Sequence[str] = ("-m", "--", "recover")) -> subprocess.Popen[str]:
    """`torchrun` with two processes; behind `--`, as it takes `--n` for the beginning of a flag of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *program]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *command], env=environment(), **pipes)


def verdict(out: Path) -> dict[str, Any]:
    whole: dict[str, Any] = json.loads((out / VERDICT).read_text())
    return {name: value for name, value in whole.items() if name != "provenance"}


def units(out: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in (out / UNITS).glob("*.json")}


def assert_same(out: Path, other: Path) -> None:
    assert verdict(out) == verdict(other)
    for name in (EXAMPLES, DELTAS):
        assert (out / name).read_bytes() == (other / name).read_bytes()
    assert set(units(out)) == set(units(other))


@pytest.mark.slow
def test_two_processes_come_to_the_verdict_of_one(root: Path, alone: Path, tmp_path: Path) -> None:
    said, errors = (process := launch(*arguments(root, tmp_path / "out"))).communicate(timeout=600)
    assert process.returncode == 0, errors
    assert said.count("Artifacts:") == 1
    assert_same(tmp_path / "out", alone)
    provenance = json.loads((tmp_path / "out" / VERDICT).read_text())["provenance"]
    assert provenance["workers"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_worker_costs_what_it_was_at(root: Path, alone: Path, tmp_path: Path, lost: int) -> None:
    out = tmp_path / "out"
    process = launch(*arguments(root, out))
    while not list(out.glob(f"{UNITS}/search-*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for child in psutil.Process(process.pid).children(recursive=True):
        if child.environ().get("RANK") == f"{lost}":
            child.send_signal(signal.SIGKILL)
    process.communicate(timeout=600)
    assert process.returncode != 0
    before = units(out)
    assert not (out / VERDICT).exists()
    _, errors = (process := launch(*arguments(root, out))).communicate(timeout=600)
    assert process.returncode == 0, errors
    after = units(out)
    assert {name: after[name] for name in before} == before  # the time that each took is in it
    assert_same(out, alone)


SCRIPT = """
import json, sys
import recover as rc
import torch
from recover.protocol import joined
from recover.run.setting import choose_features, load_setting

torch.set_num_threads(1)
config = rc.load_config(sys.argv[1], {"prompts.n": 16})
setting = load_setting(config)
defense = setting.build(choose_features(setting, 4))
with joined() as workers:
    rc.Model.batch_size = lambda *_: 4 + 3 * workers.rank  # what fits the one, and the other
    verdict = rc.check(
        setting.model, defense, setting.examples, 100.0, plan=config.plan(), runtime=rc.Runtime(workers=workers),
    )
    said = {name: value for name, value in verdict.to_dict().items() if name != "provenance"}
    with open(f"{sys.argv[2]}{workers.rank}-of-{workers.size}", "w") as file:
        json.dump([said, [record.to_json() for record in verdict.records]], file)
"""


@pytest.mark.slow
def test_a_script_is_shared_from_memory_by_workers_of_which_one_has_less(root: Path, tmp_path: Path) -> None:
    (script := tmp_path / "script.py").write_text(SCRIPT)
    command = [str(script), str(root / "defense.yaml"), f"{tmp_path}/"]
    _, errors = (process := launch(program=command)).communicate(timeout=600)
    assert process.returncode == 0, errors
    subprocess.run([sys.executable, *command], env=environment(), check=True)
    alone, *shared = [(tmp_path / name).read_text() for name in ("0-of-1", "0-of-2", "1-of-2")]
    assert shared == [alone, alone]


@pytest.mark.slow
def test_two_processes_tell_of_bad_input_once(root: Path, tmp_path: Path) -> None:
    command = [*arguments(root, tmp_path / "out"), "--model", "./nowhere"]
    said, errors = (process := launch(*command)).communicate(timeout=600)
    assert process.returncode != 0
    assert said == ""
    assert [line for line in errors.splitlines() if line.startswith("recover:")] == [
        "recover: model './nowhere': there is no such folder"
    ]
