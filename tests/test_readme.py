"""The README's own code and commands, as they stand."""

import re
from pathlib import Path

import pytest

from recover.models.host import Model
from recover.tasks import load_examples
from recover.types import InputError

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
MOST_LINES, MOST_OF_A_TASK = 25, 40


@pytest.mark.model
@pytest.mark.slow
def test_the_python_example_runs_as_it_stands(capsys, monkeypatch):
    code = CODE[-1]
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


@pytest.mark.model
def test_the_task_of_ones_own_is_one(smollm2, tmp_path, monkeypatch):
    (code,) = [code for code in CODE if "def languages" in code]
    assert len(code.splitlines()) < MOST_OF_A_TASK
    (tmp_path / "my_task.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    model = Model(smollm2.module, smollm2.tokenizer)
    found = load_examples("python:my_task:languages", model, n=4)
    assert len(found.ids) == 12
    assert found.groups is not None
    assert len(set(found.groups)) == 4
    shows = found.behavior.slack(model.run(found.prompts).logits) > 0
    assert 1 <= int(shows.sum()) < 12
    with pytest.raises(InputError, match=r"prompts\.m: the task .* has no such option; it has: n"):
        load_examples("python:my_task:languages", model, m=4)
