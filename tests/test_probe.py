"""Probes as a head, held against hooks on the plain module, closed forms, scipy, and sums by hand."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.optimize import minimize
from torch.nn import functional as F
from torch.testing import assert_close

from recover import cli
from recover.baselines.tpp import Score, ablated, effect, score
from recover.defenses.clamps import Clamp, Defense, Set
from recover.defenses.defended import defend
from recover.defenses.selection import effects, mean_activations
from recover.evidence.controls import Anywhere
from recover.models import hub
from recover.models.host import Model, Prompts
from recover.numerics.metrics import norm
from recover.protocol.phases import BY_GRADIENT
from recover.saes.sae import from_sae_lens
from recover.search.ascent import Schedule
from recover.search.ascent import find_perturbation as search
from recover.search.constraints.first_order import admissible
from recover.search.solvers import worst_case
from recover.tasks import labeled, probe
from recover.tasks.behaviors import AnswerLikelihood, known_targets
from recover.tasks.examples import Contrast
from recover.tasks.probe_heads import PooledProbe, ProbeHead, Probes, pooled_residuals, train_probes
from recover.types import InputError, Site
from tests import tiny
from tests.by_hand import D_SAE, sae_lens_sae
from tests.models import D_MODEL, FAMILIES, plain_forward, tiny_lm, token_rows

SITE, CLASSES, POS = Site(2), 3, 6


def some_probes(seed: int = 0) -> Probes:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(CLASSES, D_MODEL, generator=generator), torch.randn(CLASSES, generator=generator)
    return Probes(weight, bias, ("a", "b", "c"))


def prompts_of(n: int, seed: int = 0) -> Prompts:
    ids = torch.stack(token_rows((POS,) * n, seed))
    return Prompts(ids, torch.ones_like(ids, dtype=torch.bool))


def asking(target: int, n: int) -> PooledProbe:
    return PooledProbe(torch.full((n,), target), POS - 1, torch.arange(CLASSES))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_the_probe_of_the_mean_residual(family: str) -> None:
    module, probes, prompts = tiny_lm(family), some_probes(), prompts_of(4)
    before = module(prompts.ids).logits
    model = Model(module)
    read = ProbeHead(probes, SITE, "")(model)
    logits = read.run(prompts, reads=POS - 1).logits
    found = torch.stack([asking(target, 4).score(logits) for target in range(CLASSES)], dim=1)
    means = [plain_forward(module, ids, read=SITE)[1][1:].mean(dim=0) for ids in prompts.ids]  # type: ignore[index]
    expected = torch.stack([probes.weight @ mean + probes.bias for mean in means])
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert_close(pooled_residuals(model, prompts, SITE, 1, 3), torch.stack(means), atol=1e-4, rtol=1e-4)
    # The host is as it was, and both run beside each other.
    assert_close(model.run(prompts, reads=None).logits, before, atol=1e-4, rtol=1e-4)
    assert len(module.get_submodule(model.blocks_path)) == model.n_layers > read.n_layers


def test_a_probe_above_the_clamped_site_sees_the_blocks_between() -> None:
    module, probes, prompts = tiny_lm(), some_probes(), prompts_of(2)
    read, below = ProbeHead(probes, Site(3), "")(Model(module)), Site(1)
    push = torch.ones(D_MODEL)
    residual = Model(module).run(prompts, read=[below]).residuals[below]
    logits = read.run(prompts, start=(below, residual + push), reads=POS - 1).logits
    for ids, found in zip(prompts.ids, logits, strict=True):
        state = plain_forward(module, ids, {below: lambda h: h + push}, Site(3))[1]
        assert_close(found, state[1:] @ probes.weight.T + probes.bias, atol=1e-4, rtol=1e-4)  # type: ignore[index]


@pytest.mark.parametrize("layer", [0, 4])
def test_a_layer_without_blocks_on_both_sides_is_refused(layer: int) -> None:
    with pytest.raises(InputError, match="take a layer from 1 to 3"):
        ProbeHead(some_probes(), Site(layer), "")(Model(tiny_lm()))


def test_a_head_that_is_no_norm_and_one_map_is_refused() -> None:
    class Odd(type(tiny_lm())):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits.tanh()
            return out

    module = tiny_lm()
    module.__class__ = Odd
    with pytest.raises(InputError, match="cannot be cut short"):
        ProbeHead(some_probes(), SITE, "")(Model(module))


def test_the_smallest_perturbation_is_the_closed_form() -> None:
    """Of `w . mean(h + delta) + b >= 0`: what is missing times sqrt(T) over what C1 leaves of `w`."""
    probes, prompts, sae = some_probes(), prompts_of(8), from_sae_lens(sae_lens_sae("standard"))
    read = ProbeHead(probes, SITE, "")(Model(tiny_lm()))
    features = (1, 5, 7)
    defense = Defense((Clamp(sae, features, Set(0.0), True, "all", SITE),), 1)
    n_pos, schedule = POS - 1, Schedule(goal=0.02)
    for target in range(CLASSES):
        defended = defend(read, defense, prompts, asking(target, 8))
        low = (defended.behavior.slack(defended.defended_logits) < 0).nonzero().flatten()
        part, weight = defended.select(low), probes.weight[target].double()
        missing = -part.behavior.slack(part.defended_logits).double()
        A = sae.W_enc[:, list(features)].double()
        left = weight - A @ torch.linalg.pinv(A) @ weight
        for space, direction in ((admissible(part), left), (Anywhere(), weight)):
            unit = n_pos**0.5 / direction.norm()
            found = search(part, part.zero_delta, space, math.inf, schedule)  # which aims at twice the goal
            assert bool(found.recovered.all())
            assert_close(norm(found.delta).double(), (missing + 2 * schedule.goal) * unit, rtol=1e-3, atol=1e-4)
            nearest = worst_case(part, part.zero_delta, space, 1e3, schedule, BY_GRADIENT)
            assert_close(nearest.norm.double(), missing * unit, rtol=3e-3, atol=1e-4)


def test_another_class_can_be_asked_for_though_no_example_is_of_it() -> None:
    behavior, logits = asking(1, 2), torch.arange(24.0).reshape(2, 4, 3)
    assert known_targets(behavior) == [0, 1, 2]
    assert known_targets(AnswerLikelihood(torch.tensor([4, 4]))) == [4, 4]
    other = behavior.retarget(torch.tensor([2, 0]))
    assert other.score(logits).tolist() == [(2 + 5 + 8 + 11) / 4, (12 + 15 + 18 + 21) / 4]
    assert other.select(torch.tensor([1])).score(logits[1:]).tolist() == [16.5]


def test_training_finds_what_scipy_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(60) % 3
    mean = torch.randn(60, 4, generator=generator) * torch.tensor([1.0, 5.0, 0.2, 1.0]) + 2 * F.one_hot(label, 4)
    probes, l2 = train_probes(mean, label, ["a", "b", "c"], l2=0.05), 0.05
    x = mean.double().numpy()
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    for number in range(3):
        own = (label == number).numpy()

        def loss(theta: np.ndarray, own: np.ndarray = own) -> float:
            logits = z @ theta[:4] + theta[4]
            cost = np.logaddexp(0, np.where(own, -logits, logits))
            return float(0.5 * cost[own].mean() + 0.5 * cost[~own].mean() + 0.5 * l2 * (theta[:4] ** 2).sum())

        theta = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-8}).x
        assert_close(
            probes.logits(mean)[:, number].double(), torch.tensor(z @ theta[:4] + theta[4]), atol=2e-3, rtol=1e-3
        )


def test_training_asks_for_two_classes_with_texts() -> None:
    for labels in (["a"], ["a", "b", "c"]):
        with pytest.raises(InputError, match="at least two"):
            train_probes(torch.ones(4, 2), torch.zeros(4, dtype=torch.long), labels)


def test_effects_and_ablation_are_those_of_the_pooled_sums() -> None:
    """By sums over texts, positions and features, and as the engine runs the same ablation."""
    probes, sae, target = some_probes(), from_sae_lens(sae_lens_sae("jumprelu")), 1
    model = Model(tiny_lm())
    read = ProbeHead(probes, SITE, "")(model)
    shown, hidden = prompts_of(5, seed=1), prompts_of(7, seed=2)
    found = effects(read, sae, SITE, Contrast(shown, hidden, asking(target, 5)), 3)
    expected = torch.zeros(D_SAE)
    for feature in range(D_SAE):
        means = []
        for prompts in (shown, hidden):
            residual = model.run(prompts, read=[SITE]).residuals[SITE]
            means.append(sum(float(sae.encode(h[1:])[:, feature].sum()) for h in residual) / (len(prompts) * (POS - 1)))
        expected[feature] = max(0.0, means[0] - means[1]) * float(sae.W_dec[feature] @ probes.weight[target])
    assert (expected != 0).sum() > 5
    assert_close(found, expected, atol=1e-4, rtol=1e-4)
    activation = torch.cat([mean_activations(model, sae, SITE, prompts) for prompts in (shown, hidden)])
    pooled = effect(activation, torch.arange(12) < 5, sae.W_dec, probes.weight[target])
    assert_close(pooled, expected, atol=1e-4, rtol=1e-4)

    features = (0, 3, 4, 11)
    defense = Defense((Clamp(sae, features, Set(0.0), True, "all", SITE),), 1)
    state = defend(read, defense, shown, asking(target, 5))
    clean = state.base_logits.mean(dim=1)
    assert_close(ablated(clean, activation[:5], features, sae.W_dec, probes.weight), state.defended_logits.mean(dim=1))


def test_the_official_score_by_hand() -> None:
    """Four texts of class 0 and two of class 1; one logit a probe is enough to move its accuracy by a known amount."""
    probes = Probes(torch.zeros(2, 1), torch.zeros(2), ("a", "b"))
    label = torch.tensor([0, 0, 0, 0, 1, 1])
    clean = torch.tensor([[1.0, -1]] * 4 + [[-1.0, 1]] * 2)
    first = clean.clone()
    first[:3, 0] = -1  # three of four of class 0 are missed: its probe has (1/4 + 1) / 2
    first[0, 1] = 1  # one of four is taken for class 1: its probe has (1 + 3/4) / 2
    second = clean.clone()
    second[5, 1] = -1  # one of two of class 1 is missed
    found = score(probes, clean, [first, second], label)
    assert found == Score((0.375, 0.25), (0.125, 0.0))
    assert found.total == pytest.approx((0.375 + 0.25 - 0.125) / 2)


def test_the_shipped_texts() -> None:
    rows = labeled.load()
    assert len({row.text for row in rows}) == len(rows) == 2700
    counts = Counter((row.label, row.split) for row in rows)
    assert {label for label, _ in counts} == {"animal", "artifact", "body", "food", "person", "plant"}
    assert set(counts.values()) == {300, 150}
    assert "Princeton University" in (labeled.SHIPPED.parent / "LICENSE.wordnet").read_text()
    train = {row.text for row in rows if row.split == "train"}
    assert not train & {row.text for row in rows if row.split == "test"}


def write_rows(path: Path, rows: list[Any]) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


BIOS = [{"hard_text": f"life {number}", "profession": number % 3, "gender": number % 2} for number in range(12)]


@pytest.mark.parametrize("name", ["bios.jsonl", "bios.jsonl.gz"])
def test_bias_in_bios_from_a_file(tmp_path: Path, name: str) -> None:
    other = {"hard_text": "a poet", "profession": 20, "gender": 0}
    rows = labeled.load("bias_in_bios_1", write_rows(tmp_path / name, [*BIOS, other]))
    assert [row.text for row in rows] == [row["hard_text"] for row in BIOS]  # a profession of another set is left out
    assert {row.label for row in rows} == {"accountant", "architect", "attorney"}
    # Every third of a class is one to test with: accountants are in lines 1, 4, 7 and 10.
    assert [row.id for row in rows if row.split == "test"] == ["line-7", "line-8", "line-9"]


def test_reviews_from_a_file_that_names_its_splits(tmp_path: Path) -> None:
    kept = {"text": "fine", "category": 5, "rating": 5.0, "split": "test"}
    rows = labeled.load("amazon_reviews", write_rows(tmp_path / "a.jsonl", [kept, kept | {"category": 30}]))
    assert rows == [labeled.Labeled("line-1", "fine", "musical_instruments", "test")]


@pytest.mark.parametrize(
    ("data", "row", "said"),
    [
        ("bias_in_bios_1", "{", "is not a JSON object"),
        ("bias_in_bios_1", [1], "is not a JSON object"),
        ("bias_in_bios_1", {"hard_text": "secret", "profession": 1}, "has no 'gender'"),
        ("bias_in_bios_1", {"hard_text": " ", "profession": 1, "gender": 0}, "has no text under 'hard_text'"),
        ("bias_in_bios_1", {"hard_text": "secret", "profession": "poet", "gender": 0}, "no class under 'profession'"),
        ("bias_in_bios_1", {"hard_text": "secret", "profession": True, "gender": 0}, "no class under 'profession'"),
        ("amazon_reviews", {"text": "secret", "category": 1}, "has no 'rating'"),
        ("glosses", {"text": "secret", "label": ""}, "no class under 'label'"),
        ("glosses", {"text": "secret", "label": "x", "split": "dev"}, "neither 'train' nor 'test'"),
    ],
)
def test_a_malformed_row_is_refused_by_its_line(tmp_path: Path, data: Any, row: Any, said: str) -> None:
    fine = {"bias_in_bios_1": BIOS[0], "amazon_reviews": {"text": "x", "category": 1, "rating": 1.0}}
    rows = [fine.get(data, {"text": "x", "label": "y"}), "", row]
    with pytest.raises(InputError) as error:
        labeled.load(data, write_rows(tmp_path / "rows.jsonl", rows))
    assert f"rows.jsonl, line 3: {said}" in str(error.value) or (
        said in str(error.value) and "line 3" in str(error.value)
    )
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"{}\n\xff")
    (tmp_path / "torn.gz").write_bytes(b"no gzip")
    for name, said in (("none", "cannot be read"), ("latin", "line 2: is not UTF-8"), ("torn.gz", "cannot be read")):
        with pytest.raises(InputError, match=said):
            labeled.load("glosses", tmp_path / name)
    with pytest.raises(InputError, match="has no text of a class"):
        labeled.load("bias_in_bios_3", write_rows(tmp_path / "other.jsonl", BIOS))


def test_a_set_out_of_reach_says_what_to_download(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("a long story\nof several lines")

    monkeypatch.setattr(hub, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(InputError) as error:
        labeled.load("bias_in_bios_2")
    assert str(error.value) == (
        "data set LabHC/bias_in_bios: not in the cache, and no hub to be reached; download its rows as JSON lines with "
        "the columns hard_text, profession, gender, and name that file as prompts.file"
    )


def test_a_set_of_the_hub_is_read_split_by_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    parts = {
        "train": [{"text": "a", "category": 1, "rating": 1.0}],
        "test": [{"text": "b", "category": 2, "rating": 5.0}],
    }
    monkeypatch.setattr(hub, "hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: parts[split])
    found = [(row.id, row.label, row.split) for row in labeled.load("amazon_reviews")]
    assert found == [("train-1", "toys_and_games", "train"), ("test-1", "cell_phones_and_accessories", "test")]
    parts["test"][0]["text"] = None
    with pytest.raises(InputError, match="test row 1: has no text under 'text'"):
        labeled.load("amazon_reviews")


def test_a_draw_is_the_beginning_of_every_larger_one() -> None:
    rows = labeled.load()
    few, more = labeled.draw(rows, "train", 3, 5), labeled.draw(rows, "train", 3, 9)
    assert [few[start : start + 5] for start in range(0, 30, 5)] == [
        more[start : start + 5] for start in range(0, 54, 9)
    ]
    assert labeled.draw(rows, "train", 4, 5) != few
    assert len(labeled.draw(rows, "test", 0)) == 900


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and SAE, and texts of three kinds of words that its tokenizer knows."""
    root = tiny.make(tmp_path_factory.mktemp("tiny"))
    draw, words = random.Random(0), tiny.words()
    kinds = {"one": words[:40], "two": words[40:80], "three": words[80:120]}
    rows = [
        {"text": " ".join(draw.choice(known) for _ in range(8)), "label": label, "split": split}
        for split, n in (("train", 40), ("test", 20))
        for _ in range(n)
        for label, known in kinds.items()
    ]
    write_rows(root / "texts.jsonl", [*rows, {"text": "Mary", "label": "one", "split": "test"}])
    settings = tiny.configuration(
        root,
        clamps__features={"select": "effect", "top": 6},
        clamps__value=0.0,
        clamps__only_active=True,
        task="probe",
        prompts={"target": "two", "layer": 1, "file": str(root / "texts.jsonl"), "tokens": 6},
        search={"budget": 100.0, "steps": 20, "curve": [0.5, 1.0]},
        transfer={"norms": [1.0], "splits": 1, "draws": 10, "steps": 30},
        skip_first=1,
    )
    (root / "probe.yaml").write_text(yaml.safe_dump(settings))
    return root


def test_a_check_brings_the_probe_back_and_does_not_call_that_specific(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["check", str(folder / "probe.yaml"), "--out", str(out)]) == 0
    verdict = json.loads((out / "verdict.json").read_text())
    recovery, transfer = verdict["recovery"], verdict["transfer"]
    assert verdict["verdict"] == "RECOVERABLE", said.getvalue()
    assert recovery["recovered"] == verdict["counts"]["valid_flips"] >= 8
    assert recovery["drift_max"] < 1e-4  # activations here are of the size of ten
    known = verdict["knowledge"]
    assert (verdict["content"], known["content"]["by"]) == ("unknown", "one_answer")
    # The own class is shared, so that a delta fitted to it holds; one fitted to another class holds as well, for that.
    assert transfer["own"]["hits"] > 0.9 * transfer["own"]["n"]
    assert verdict["rule"] is not True
    assert all(other["holds"]["rate"] > 0.9 for other in known["rule"]["others"])
    assert verdict["fit"]["loss_recovered"] is not None
    assert verdict["threat_model"]["positions"] == "last 5"


def test_the_task_leaves_out_what_is_short_and_refuses_what_is_not_there(folder: Path) -> None:
    from recover.models.names import resolve_model

    loaded = resolve_model(str(folder / "model"), "cpu")
    model, file = Model(loaded.module, loaded.tokenizer), folder / "texts.jsonl"
    examples = probe.make_examples(model, target="one", layer=1, file=file, tokens=6, train=10)
    assert len(examples.ids) == 20  # the single word is too short
    assert examples.prompts.ids.shape == (20, 6)
    (another,) = examples.rules
    assert another.targets is not None
    own = int(examples.behavior.target[0])  # type: ignore[attr-defined]
    assert another.targets.tolist() == [(own + 1) % 3] * 20
    assert examples.contrast is not None
    assert (len(examples.contrast.shown), len(examples.contrast.hidden)) == (10, 20)
    again = probe.make_examples(model, target="one", layer=1, file=file, tokens=6, train=11)
    assert again.prompts.ids.tolist() == examples.prompts.ids.tolist()
    assert again.sha256 != examples.sha256  # other probes
    for options, said in (
        ({"target": "on"}, "did you mean 'one'"),
        ({"target": "one", "tokens": 60}, "ask for fewer tokens"),
        ({"target": "one", "layer": 9}, "the model has 3 blocks"),
    ):
        with pytest.raises(InputError, match=said):
            probe.make_examples(model, **{"layer": 1, "file": file, "tokens": 6, **options})
