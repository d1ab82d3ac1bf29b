"""The code of the README, of CONTRIBUTING and of the pages on a defense and a task of one's own, as it stands."""

import re
from pathlib import Path

import pytest

from recover.models.host import Model
from recover.run.config import load_config
from recover.tasks import load_examples
from recover.types import InputError

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
OWN_DEFENSE, OWN_TASK = (
    (ROOT / "docs" / "pages" / "howto" / name).read_text(encoding="utf-8") for name in ("own-defense.md", "own-task.md")
)
MOST_BYTES, MOST_LINES, MOST_OF_A_TASK = 10_000, 25, 40


def code_of(page: str, word: str, language: str = "python") -> str:
    blocks = re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)
    (code,) = [block for block in blocks if word in block]
    return code


def test_the_readme_is_short():
    assert len(README.encode()) <= MOST_BYTES


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", README))))
def test_a_link_of_the_readme_leads_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("page", [README, OWN_DEFENSE], ids=["README", "own-defense"])
def test_the_python_example_runs_as_it_stands(page, capsys, monkeypatch):
    code = code_of(page, "find_perturbation")
    assert len(code.splitlines()) <= MOST_LINES
    monkeypatch.chdir(ROOT)
    scope: dict = {"__name__": "readme"}
    exec(compile(code, "example", "exec"), scope)
    certificate = scope["certificate"]
    assert len(certificate.shows) >= 1
    assert certificate.norm.max() <= 20
    assert certificate.constraint_residual.max() <= 1e-5
    assert capsys.readouterr().out


def test_the_file_of_the_readme_is_a_configuration(tmp_path):
    (tmp_path / "defense.yaml").write_text(code_of(README, "clamps:", "yaml"))
    config = load_config(tmp_path / "defense.yaml")
    assert config.search.budget == 20
    assert config.clamps[0].features == (12, 345, 678)


@pytest.mark.parametrize(
    "name",
    sorted(set(re.findall(r"`((?:recover|analyses|fixtures|docs|tests|property_tests)/[\w./]+)`", CONTRIBUTING))),
)
def test_what_the_house_names_is_there(name):
    assert (ROOT / name).exists()


@pytest.mark.model
def test_the_task_of_ones_own_is_one(smollm2, tmp_path, monkeypatch):
    code = code_of(OWN_TASK, "def languages")
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
