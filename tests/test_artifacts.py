"""The folder of a run, by itself: what is kept, what is read back, and what is refused."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from recover import artifacts
from recover.artifacts import DELTAS, EXAMPLES, LOCK, RUN, RunFolder, RunState, write_whole
from recover.certify import Certificate
from recover.records import ExampleRecord, SearchRecord
from recover.types import InputError

STATE = RunState(config={"task": "ioi"}, keep_text=False, fingerprint="f", batch_size=2, features=[[3, 1]])
MEASURED = {field.name: 0.1 for field in dataclasses.fields(Certificate)}


def record(name, **changes):
    values = {"base_slack": 0.1, "defended_slack": -1 / 3, "search": SearchRecord("RECOVERED", 3, 0.1, 2e-3)}
    return ExampleRecord(name, **values | {"certificate": MEASURED} | changes)


@pytest.fixture
def opened(tmp_path):
    """Opens the folder `out`, and closes what was opened at the end."""
    folders = []

    def start():
        while folders:
            folders.pop().close()
        folders.append(RunFolder(tmp_path / "out"))
        return folders[-1]

    yield start
    while folders:
        folders.pop().close()


def names(path):
    return {entry.name for entry in path.iterdir()} - {LOCK}


def test_a_later_start_reads_back_what_an_earlier_one_kept(opened):
    first = opened()
    assert first.state is None
    first.begin(STATE)
    deltas = {name: torch.randn(1, 5) for name in ("a", "b")}
    first.save_deltas({"a": deltas["a"]})
    first.save([record("a"), record("c", search=None, certificate=None, text="Mary")])
    first.save_deltas({"b": deltas["b"]})
    first.save([record("b")])

    second = opened()
    assert second.state == STATE
    second.resume()
    kept = {"a": record("a"), "c": record("c", search=None, certificate=None, text="Mary"), "b": record("b")}
    assert second.finished() == first.finished() == kept
    assert list(second.finished()) == ["a", "c", "b"]
    assert all(torch.equal(second.delta(name), delta) for name, delta in deltas.items())
    assert set(load_file(second.path / DELTAS)) == {"a", "b"}


def test_deltas_are_kept_in_float32_whatever_they_come_in(opened):
    folder = opened()
    wide = torch.randn(1, 6, dtype=torch.float64)
    folder.save_deltas({"a": wide, "b": wide.to(torch.bfloat16), "c": wide.float().T.expand(6, 2).T})
    kept = load_file(folder.path / DELTAS)
    assert {delta.dtype for delta in kept.values()} == {torch.float32}
    assert torch.equal(kept["a"], wide.float())
    assert torch.equal(kept["c"], wide.float().expand(2, 6))


def test_a_delta_is_read_from_the_file_and_not_from_memory(opened):
    folder = opened()
    folder.save_deltas({"a": torch.zeros(1, 3)})
    other = RunFolder.__new__(RunFolder)
    other.path, other._deltas = folder.path, {}
    other.name = "other"
    other.save_deltas({"a": torch.ones(1, 3)})
    assert torch.equal(folder.delta("a"), torch.ones(1, 3))


def test_numbers_that_are_not_finite_are_the_same_before_and_after_a_restart(opened):
    folder = opened()
    folder.begin(STATE)
    broken = record(
        "a",
        base_slack=math.inf,
        defended_slack=math.nan,
        search=SearchRecord("NON_FINITE", 0, math.nan, -math.inf),
        certificate=MEASURED | {"drift": None, "threshold_margin": [0.5, None]},
    )
    folder.save([broken])
    before = folder.finished()["a"]
    line = json.loads((folder.path / EXAMPLES).read_text())
    assert (line["base_slack"], line["search"]["slack"], line["certificate"]["drift"]) == (None, None, None)
    folder = opened()
    folder.save_deltas({"a": torch.zeros(1, 3)})
    folder.resume()
    after = folder.finished()["a"]
    assert repr(after) == repr(before)
    assert math.isnan(after.base_slack)
    assert math.isnan(after.search.slack)
    assert not after.shows_at_base
    assert after.certificate["threshold_margin"] == [0.5, None]


@pytest.mark.parametrize(
    ("base", "defended", "flip"),
    [(0.1, -0.1, True), (0.1, 0.1, False), (-0.1, -0.1, False), (0.1, 0.0, True), (0.0, -1.0, False)],
)
def test_valid_flip_is_in_the_line(base, defended, flip):
    line = record("a", base_slack=base, defended_slack=defended).to_json()
    assert json.loads(line)["valid_flip"] is flip
    assert "text" not in json.loads(line)
    assert ExampleRecord.from_json(line) == record("a", base_slack=base, defended_slack=defended)


def test_deltas_without_their_records_do_not_count(opened):
    """Killed between the two writes: the example is done again, and its delta replaced."""
    folder = opened()
    folder.begin(STATE)
    folder.save_deltas({"a": torch.ones(1, 3)})
    folder = opened()
    folder.resume()
    assert folder.finished() == {}
    folder.save_deltas({"a": torch.zeros(1, 3)})
    folder.save([record("a")])
    assert torch.equal(folder.delta("a"), torch.zeros(1, 3))


def test_records_without_their_deltas_are_damage(opened):
    folder = opened()
    folder.begin(STATE)
    folder.save([record("a")])
    with pytest.raises(InputError, match=r"deltas.safetensors is damaged \(it lacks 1 deltas .* the first a\)"):
        opened().resume()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    write_whole(tmp_path / "x", b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((artifacts.os, "fsync", fail) if moment == "fsync" else (artifacts.Path, "replace", fail)))
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "x", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x": b"old"}


def test_what_a_killed_write_left_is_removed_and_nothing_of_others(opened, tmp_path):
    folder = opened()
    folder.begin(STATE)
    (folder.path / f"{artifacts.TEMPORARY}abc").write_text("half")
    (folder.path / ".other.tmp").write_text("mine")
    (folder.path / "notes").write_text("mine")
    assert names(opened().path) == {RUN, ".other.tmp", "notes"}


def test_only_one_at_a_time(opened, tmp_path):
    folder = opened()
    with pytest.raises(InputError, match="another recover is at work there"):
        RunFolder(tmp_path / "out")
    folder.close()
    opened()


def test_a_folder_that_was_made_for_nothing_goes_away(tmp_path):
    RunFolder(tmp_path / "a" / "b").close()
    assert names(tmp_path / "a") == set()
    (tmp_path / "mine").mkdir()
    RunFolder(tmp_path / "mine").close()
    assert (tmp_path / "mine").is_dir()
    folder = RunFolder(tmp_path / "run")
    folder.begin(STATE)
    folder.close()
    assert names(tmp_path / "run") == {RUN}


def test_a_refused_folder_is_not_held(tmp_path):
    folder = RunFolder(tmp_path / "out")
    folder.begin(STATE)
    folder.close()
    whole = (tmp_path / "out" / RUN).read_text()
    (tmp_path / "out" / RUN).write_text("{")
    # The error, kept, keeps the refused object: nothing but its own care lets go of the folder.
    with pytest.raises(InputError) as refusal:
        RunFolder(tmp_path / "out")
    (tmp_path / "out" / RUN).write_text(whole)
    RunFolder(tmp_path / "out").close()
    assert "run.json is damaged" in str(refusal.value)


def test_files_can_be_read_by_others(tmp_path):
    write_whole(tmp_path / "x", b"")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
