"""A newcomer's analysis (`analyses/layers.py`): 40 lines of public names, whose figure says what certificates say."""

from __future__ import annotations

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import recover as rc

SCRIPT = Path(__file__).parent.parent / "analyses" / "layers.py"
MOST_LINES = 40


def code_of(source: str) -> list[str]:
    """The lines of a script that are code: neither blank, nor comments, nor its docstring."""
    first = ast.parse(source).body[0]
    lines = source.splitlines()[first.end_lineno :]
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def test_it_is_forty_lines_of_public_names() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    assert len(code_of(source)) <= MOST_LINES
    used = {node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute | ast.ImportFrom)}
    top = {node.attr for node in used if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "rc"}
    assert {"load_model", "load_sae", "load_examples", "select_features", "smallest_perturbation", "certify"} <= top
    assert top <= set(rc.__all__)


@pytest.mark.model
@pytest.mark.slow
def test_its_figure_says_what_certificates_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One layer and a few prompts; the points of the figure are computed again, with another search beside them."""
    figure = tmp_path / "layers.svg"
    monkeypatch.setattr(sys, "argv", ["layers.py", "--layers", "15", "--n", "16", "--figure", str(figure)])
    names: dict[str, Any] = runpy.run_path(str(SCRIPT))
    assert figure.read_text(encoding="utf-8").startswith("<?xml")
    said = capsys.readouterr().out
    target, found, facts = names["target"], names["found"], names["facts"]
    assert len(target) >= 4
    # Every one is back with the clamped features where they were, and none is longer than the clamp's displacement.
    assert bool((facts.shows & facts.held).all())
    assert f"{len(target)} of {len(target)} back" in said
    points = torch.tensor(names["axes"].collections[0].get_offsets().filled())
    held = rc.EncoderOrthogonal.of(*names["defense"].clamps)
    for row, (displacement, norm) in enumerate(points.tolist()):
        delta = found.delta[row : row + 1]
        assert norm == pytest.approx(float(delta.norm()), rel=1e-5)
        at_base, defended = (names["defended"].base[:, -1], names["defended"].suffix.residual[:, -1])
        moved = (defended - at_base)[names["defended"].valid_flips[row]].norm()
        assert displacement == pytest.approx(float(moved), rel=1e-4)
        assert float((held.project(delta) - delta).norm()) < 1e-4 * norm
    # The smallest norm is the edge: a little less does not bring the behavior back, and no search finds half of it.
    shorter = rc.certify(
        names["model"], names["defense"], names["flips"].prompts, names["flips"].behavior, 0.9 * found.delta
    )
    assert not bool(shorter.shows.any())
    half = 0.5 * float(found.norm.min())
    assert not bool(rc.find_perturbation(target, target.zero_delta, held, half).recovered.any())
    shared = names["shared"]
    told = re.search(r"shared: (\d+) of (\d+) unseen prompts; fitted to shuffled answers: (\d+)", said)
    assert told is not None
    assert [int(one) for one in told.groups()] == [shared.own, shared.n, shared.shuffled]
    fitted = 2 * len(names["ids"]) - shared.n - len(names["ids"])
    assert 0 <= shared.own <= shared.n
    assert fitted >= shared.n - 1
