"""The folder of a run, by itself: what is kept, what is read back, and what is refused."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from recover.protocol import folder as artifacts
from recover.protocol.folder import DELTAS, EXAMPLES, LOCK, RUN, UNITS, RunFolder, RunState, write_whole
from recover.protocol.ledger import InMemoryStore, Store
from recover.protocol.records import ExampleRecord, without_nan
from recover.types import InputError
from tests.hand_made import SHOWS_THROUGHOUT, certified, flip, searched

STATE = RunState(
    config={"task": "ioi"}, keep_text=False, fingerprint="f", batch_size=2, features=[[3, 1]], values=[-5.0]
)


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
    deltas = {name: torch.randn(1, 5) for name in ("a", "a/smallest", "transfer/0/c1/5/0")}
    units = {
        "fit": [0.1, 1 / 3, None],
        "accounting/0": {"a": {"base_slack": 0.1, "text": 'Mary "ünï"\n'}},
        "search/0": {"a": {"norm": 2e-300}},
        "search/10": {},
        "transfer/0": {"transfer/0/c1/5/0": {"fitted": 3}},
    }
    first.keep("fit", units["fit"], {})
    first.keep("accounting/0", units["accounting/0"], {})
    first.keep("search/0", units["search/0"], {name: deltas[name] for name in ("a", "a/smallest")})
    first.keep("search/10", units["search/10"], {})
    first.keep("transfer/0", units["transfer/0"], {"transfer/0/c1/5/0": deltas["transfer/0/c1/5/0"]})

    second = opened()
    assert second.state == STATE
    assert second.load("fit") is None
    second.resume()
    for name, values in units.items():
        assert second.load(name) == first.load(name) == values
    assert second.load("search/1") is second.load("search") is None
    assert all(torch.equal(second.delta(name), delta) for name, delta in deltas.items())
    assert names(second.path) == {RUN, UNITS}
    second.finish([])
    assert names(second.path) == {RUN, UNITS, DELTAS, EXAMPLES}
    assert {path.name for path in (second.path / UNITS).glob("*.safetensors")} == set()
    gathered = load_file(second.path / DELTAS)
    assert set(gathered) == set(deltas)
    third = opened()
    third.resume()
    for store in (second, third):
        assert all(torch.equal(store.delta(name), delta) for name, delta in deltas.items())


def test_every_unit_has_a_file_of_its_own_and_is_written_whole(opened, monkeypatch):
    folder = opened()
    folder.begin(STATE)
    written = []
    real = artifacts.write_whole

    def watched(path, content):
        written.append(path.relative_to(folder.path).as_posix())
        real(path, content)

    monkeypatch.setattr(artifacts, "write_whole", watched)
    folder.keep("search/3", [], {"a": torch.zeros(1, 3)})
    folder.keep("fit", [], {})
    # Deltas go before what speaks of them, and are not written where there are none.
    assert written == ["units/search-3.safetensors", "units/search-3.json", "units/fit.json"]
    assert names(folder.path / UNITS) == {"search-3.safetensors", "search-3.json", "fit.json"}


def test_a_worker_knows_what_another_finished(opened):
    folder, values = opened(), {"a": [1.5]}
    folder.begin(STATE)
    folder.keep("search/0", values, {"a": torch.ones(1, 3)})
    folder.keep("fit", [], {})
    other = RunFolder(folder.path, holds=False)
    for unit in folder.units:
        other.take(unit, folder.given(unit))
    assert other.load("search/0") == values
    assert torch.equal(other.delta("a"), torch.ones(1, 3))
    folder.finish([])
    again = RunFolder(folder.path, holds=False)
    again.take("search/0", folder.given("search/0"))
    assert torch.equal(again.delta("a"), torch.ones(1, 3))
    other.close()  # which lets go of nothing that the one that holds the folder has
    with pytest.raises(InputError, match="another recover is at work there"):
        RunFolder(folder.path)


def test_what_was_kept_cannot_be_changed_from_outside(opened):
    for store in (opened(), InMemoryStore()):
        assert isinstance(store, Store)
        if isinstance(store, RunFolder):
            store.begin(STATE)
        values = {"a": [1, 2]}
        store.keep("search/0", values, {})
        values["a"].append(3)
        store.load("search/0")["a"].append(4)
        assert store.load("search/0") == {"a": [1, 2]}


def test_a_number_that_is_not_finite_is_no_value_of_a_unit(opened):
    for store in (opened(), InMemoryStore()):
        if isinstance(store, RunFolder):
            store.begin(STATE)
        with pytest.raises(ValueError, match="not JSON compliant"):
            store.keep("search/0", {"a": math.inf}, {})
        assert store.load("search/0") is None


def test_deltas_are_kept_in_float32_whatever_they_come_in(opened):
    folder = opened()
    folder.begin(STATE)
    wide = torch.randn(1, 6, dtype=torch.float64)
    folder.keep("search/0", {}, {"a": wide, "b": wide.to(torch.bfloat16), "c": wide.float().T.expand(6, 2).T})
    folder.finish([])
    kept = load_file(folder.path / DELTAS)
    assert {delta.dtype for delta in kept.values()} == {torch.float32}
    assert torch.equal(kept["a"], wide.float())
    assert torch.equal(kept["c"], wide.float().expand(2, 6))


def test_a_delta_is_read_from_the_file_and_not_from_memory(opened):
    folder = opened()
    folder.begin(STATE)
    folder.keep("search/0", {}, {"a": torch.zeros(1, 3)})
    other = RunFolder(folder.path, holds=False)
    other.keep("search/0", {}, {"a": torch.ones(1, 3)})
    assert torch.equal(folder.delta("a"), torch.ones(1, 3))


def test_numbers_that_are_not_finite_are_the_same_before_and_after_a_restart(opened):
    """In a unit, as `check` hands them over, and in the lines that are written at the end."""
    folder = opened()
    folder.begin(STATE)
    broken = certified(
        searched(flip("a"), status="NON_FINITE", steps=0, score=math.nan, slack=-math.inf, smallest=math.inf),
        drift=None,
        threshold_margin=[0.5, None],
    )
    broken = replace(broken, base_slack=math.inf, defended_slack=math.nan)
    line = json.loads(broken.to_json())
    folder.keep("search/0", without_nan({name: value for name, value in line.items() if name != "valid_flip"}), {})
    before = ExampleRecord.of(folder.load("search/0"))
    folder.finish([broken])
    assert (line["base_slack"], line["search"]["slack"], line["certificate"]["drift"]) == (None, None, None)
    assert json.loads((folder.path / EXAMPLES).read_text()) == line
    folder = opened()
    folder.resume()
    after = ExampleRecord.of(folder.load("search/0"))
    assert repr(after) == repr(before)
    assert math.isnan(after.base_slack)
    assert math.isnan(after.search.slack)
    assert after.search.smallest == math.inf
    assert not after.shows_at_base
    assert after.certificate.threshold_margin == (0.5, None)


def test_records_are_written_a_line_each(opened):
    folder = opened()
    folder.begin(STATE)
    records = [flip("b"), replace(SHOWS_THROUGHOUT, text='Mary "ünï"\n'), flip("a", slack=1 / 3)]
    folder.finish(records)
    lines = folder.read(EXAMPLES).splitlines()
    assert [ExampleRecord.from_json(line) for line in lines] == records


@pytest.mark.parametrize(
    ("base", "defended", "is_flip"),
    [(0.1, -0.1, True), (0.1, 0.1, False), (-0.1, -0.1, False), (0.1, 0.0, True), (0.0, -1.0, False)],
)
def test_valid_flip_is_in_the_line(base, defended, is_flip):
    record = replace(flip("a"), base_slack=base, defended_slack=defended)
    line = record.to_json()
    assert json.loads(line)["valid_flip"] is is_flip
    assert "text" not in json.loads(line)
    assert ExampleRecord.from_json(line) == record


def test_deltas_without_their_unit_do_not_count(opened, monkeypatch):
    """Killed between the two writes: the unit is done again, and its delta replaced."""
    folder = opened()
    folder.begin(STATE)

    def killed(name, content):
        if not name.endswith(".safetensors"):
            raise KeyboardInterrupt
        write_whole(folder.path / name, content)

    monkeypatch.setattr(folder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.keep("search/0", {"a": 1}, {"a": torch.ones(1, 3)})
    assert folder.load("search/0") is None
    folder = opened()
    folder.resume()
    assert folder.load("search/0") is None
    assert torch.equal(folder.delta("a"), torch.ones(1, 3))
    folder.keep("search/0", {"a": 2}, {"a": torch.zeros(1, 3)})
    assert torch.equal(folder.delta("a"), torch.zeros(1, 3))
    assert folder.load("search/0") == {"a": 2}


def test_a_unit_without_its_deltas_is_damage(opened):
    folder = opened()
    folder.begin(STATE)
    folder.keep("search/0", {}, {"a": torch.ones(1, 3), "a/smallest": torch.ones(1, 3)})
    (folder.path / UNITS / "search-0.safetensors").unlink()
    complaint = r"units/search-0.json is damaged \(2 deltas that it speaks of are not there, the first a\)"
    with pytest.raises(InputError, match=complaint):
        opened().resume()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'{"unit": "search/0", "values": {}}', "deltas Field required"),
        (b'{"unit": "search/0", "deltas": []}', "values Field required"),
        (b'{"unit": "search/0", "deltas": null, "values": {}}', "deltas"),
        (b'{"unit": 3, "deltas": [], "values": {}}', "unit"),
        (b"\xff", ""),
        (b"", "JSON"),
    ],
)
def test_a_unit_that_is_damaged_is_named_in_one_line(opened, content, why):
    folder = opened()
    folder.begin(STATE)
    folder.keep("fit", [], {})
    (folder.path / UNITS / "search-0.json").write_bytes(content)
    with pytest.raises(InputError, match=r"^--out \S+: units/search-0.json is damaged \([^\n]*\); [^\n]*$") as refusal:
        opened().resume()
    assert why in str(refusal.value)


def test_a_run_without_its_units_begins_again(opened):
    """Killed before they were made, or removed by hand."""
    folder = opened()
    folder.begin(STATE)
    (folder.path / UNITS).rmdir()
    folder = opened()
    folder.resume()
    folder.keep("fit", [1], {})
    assert folder.load("fit") == [1]


@pytest.mark.parametrize("name", [DELTAS, f"{UNITS}/search-0.safetensors"])
def test_damaged_deltas_are_named_in_one_line(opened, name):
    folder = opened()
    folder.begin(STATE)
    (folder.path / name).write_bytes(b"no tensors")
    with pytest.raises(InputError, match=rf"^--out \S+: {name} is damaged \([^\n]*\); [^\n]*$"):
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
    (folder.path / UNITS / f"{artifacts.TEMPORARY}abc").write_text("half")
    (folder.path / ".other.tmp").write_text("mine")
    (folder.path / "notes").write_text("mine")
    assert names(opened().path) == {RUN, UNITS, ".other.tmp", "notes"}
    assert names(folder.path / UNITS) == set()


def test_what_is_renamed_while_leftovers_are_removed_is_left_alone(opened, tmp_path, monkeypatch):
    folder = opened()
    (folder.path / f"{artifacts.TEMPORARY}abc").write_text("whole")
    monkeypatch.setattr(
        artifacts.Path, "glob", lambda *_, glob=artifacts.Path.glob: [renamed(path) for path in list(glob(*_))]
    )
    assert names(opened().path) == {"abc"}


def renamed(path):
    """The same name, whose file has gone elsewhere."""
    path.rename(path.with_name(path.name.removeprefix(artifacts.TEMPORARY)))
    return path


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
    assert names(tmp_path / "run") == {RUN, UNITS}


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
