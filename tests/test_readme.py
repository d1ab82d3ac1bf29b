"""The README's own code and commands, as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
MOST_LINES = 25


@pytest.mark.model
@pytest.mark.slow
def test_the_python_example_runs_as_it_stands(capsys, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(code.splitlines()) <= MOST_LINES
    monkeypatch.chdir(Path(__file__).parent.parent)
    scope: dict = {"__name__": "readme"}
    exec(compile(code, "README.md", "exec"), scope)
    certificate = scope["certificate"]
    assert len(certificate.shows) >= 1
    assert certificate.norm.max() <= 20
    assert certificate.constraint_residual.max() <= 1e-5
    assert capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:recover|analyses|fixtures)/[\w./]+)`", README))))
def test_what_the_map_names_is_there(name):
    assert (Path(__file__).parent.parent / name).exists()
