"""Published settings: what they name is there, they run as they stand from a cache of the hub's layout; their figures.

Nothing here reaches a hub but the tests marked so. Models and SAEs are tiny ones under the real names
(`tests.hub_layout`); prompts are few and searches short, and nothing else of a setting is changed.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import sae_lens
import torch
import transformers
import yaml
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from recover import cli
from recover.models import hub as hubs
from recover.models import names
from recover.models.host import Model
from recover.protocol.verdict_model import Verdict
from recover.report.html import to_html
from recover.report.markdown import to_markdown
from recover.report.published import PublishedFigure, check_path, compared, lookup
from recover.report.text import to_text
from recover.run.config import Config, load_config
from recover.run.runner import beside_published, run_check
from recover.run.setting import load_setting
from recover.saes import names as sae_names
from recover.saes.sae import from_sae_lens
from recover.tasks import ioi
from recover.tasks.dialogue import stops
from recover.tasks.prose import ORDINARY
from recover.types import InputError, Site
from tests import finished_runs, hub_layout
from tests.hand_made import conclude, flip
from tests.models import left_padded, plain_forward, tiny_lm
from tests.saes import random_sae

FOLDER = Path(__file__).parents[1] / "analyses" / "published"
SETTINGS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
SCHEMA = json.loads(resources.files("recover.protocol").joinpath("verdict.schema.json").read_text())
REFUSAL = [Site(layer, "post") for layer in range(5, 20)]
SITES = {
    "ioi_gpt2": [Site(4, "pre")],
    "tpp_gemma2": [Site(5, "post")],
    "wmdp_bio_gemma2": [Site(7, "post")],
    "refusal_advbench_gemma2": REFUSAL,
    "refusal_harmbench_gemma2": REFUSAL,
}
"""What the comments of each file say of where it clamps."""
FEATURES = {
    "ioi_gpt2": 64,
    "tpp_gemma2": 500,
    "wmdp_bio_gemma2": 20,
    "refusal_advbench_gemma2": 61,
    "refusal_harmbench_gemma2": 61,
}
SHORT = {
    "controls.random_draws": 2,
    "controls.planted_routes": 1,
    "controls.placebo_features": 0,
    "search.steps": 3,
    "transfer.draws": 2,
    "transfer.shuffles": 1,
    "transfer.splits": 1,
    "transfer.rules": 1,
    "transfer.scales": [1.0],
    "transfer.steps": 2,
    "device": "cpu",
}


def setting(name: str, **changes: Any) -> Config:
    """A published setting; `section__key` changes a value."""
    return load_config(FOLDER / f"{name}.yaml", {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, out of reach of the hub; Gemma Scope's SAEs are as narrow there as our models."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    real, width = pretrained_sae_loaders.get_gemma_2_config_from_hf, hub_layout.GEMMA_WIDTH
    narrow = {"d_in": width, "d_sae": 2 * width}
    monkeypatch.setattr(
        pretrained_sae_loaders, "get_gemma_2_config_from_hf", lambda *args, **named: real(*args, **named) | narrow
    )
    return tmp_path / "hub"


def folders_of(config: Config) -> list[str]:
    """Where sae_lens's directory says that the SAEs of a configuration lie in their repository."""
    pairs = (clamp.sae.split(":", 1) for clamp in config.clamps)
    return [get_pretrained_saes_directory()[release].saes_map[sae_id] for release, sae_id in pairs]


# What the files name


def test_there_is_a_setting_for_each_published_task() -> None:
    assert set(SETTINGS) == set(SITES)
    assert {load_config(FOLDER / f"{name}.yaml").task for name in SETTINGS} == {"ioi", "probe", "choice", "refusal"}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_as_published_and_names_saes_that_sae_lens_lists(name: str) -> None:
    config = setting(name)
    assert sum(clamp.features.top for clamp in config.clamps if not isinstance(clamp.features, tuple)) == FEATURES[name]
    for clamp, site in zip(config.clamps, SITES[name], strict=True):
        release, sae_id = clamp.sae.split(":", 1)
        listed = get_pretrained_saes_directory()[release]
        assert sae_id in listed.saes_map
        assert listed.model == {"openai-community/gpt2": "gpt2-small"}.get(config.model, "gemma-2-2b")
        neuronpedia = listed.neuronpedia_id[sae_id]
        assert neuronpedia is None or re.search(r"/(\d+)-", neuronpedia)[1] == str(site.layer)  # type: ignore[index]
        if "gemma" in release:  # sae_lens reads these off the name, with no look at the hub
            told = pretrained_sae_loaders.load_sae_config_from_huggingface(release, sae_id)
            assert told["metadata"]["hook_name"] == site.hook_name
            assert (told["d_in"], told["d_sae"], told["architecture"]) == (2304, 16384, "jumprelu")
        else:
            assert sae_id == site.hook_name


@pytest.mark.parametrize("name", SETTINGS)
def test_hooks_are_the_modules_of_the_models_named(name: str) -> None:
    """Of random models as deep as the real ones: the residual read is that of a PyTorch hook, and of transformers."""
    family, depth, path = ("gpt2", 12, "transformer.h") if name == "ioi_gpt2" else ("gemma2", 26, "model.layers")
    size = {"n_layer": depth} if family == "gpt2" else {"num_hidden_layers": depth, "layer_types": None}
    module = tiny_lm(family, **size)
    model = Model(module)
    assert (model.blocks_path, model.n_layers) == (path, depth)
    ids = torch.tensor([5, 9, 3, 17, 4])
    prompts = left_padded([ids])
    states = module(input_ids=ids[None], output_hidden_states=True, use_cache=False).hidden_states
    read = model.run(prompts, read=SITES[name]).residuals
    for site in SITES[name]:
        by_hook = plain_forward(module, ids, read=site)[1]
        assert by_hook is not None
        torch.testing.assert_close(read[site][0], by_hook)
        torch.testing.assert_close(read[site][0], states[site.index][0])


# Agreement


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("recovery.rat", "no number of verdict.json is there; did you mean 'recovery.rate'?"),
        ("recovery..rate", "did you mean 'recovery.rate'?"),
        ("recovery.replies.base_like", "is a section of verdict.json and no number in it; did you mean"),
        ("curve[].rate", "did you mean 'curve[0].rate'?"),
        ("verdict", "no number of verdict.json is there"),
        ("published[0].ours", "no number of verdict.json is there"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused_with_the_nearest(path: str, said: str, tmp_path: Path) -> None:
    check_path("curve[3].rate")
    file = tmp_path / "defense.yaml"
    values = yaml.safe_load((FOLDER / "ioi_gpt2.yaml").read_text())
    values["published"]["figures"] = [{"figure": path, "value": 1.0}]
    file.write_text(yaml.safe_dump(values))
    with pytest.raises(InputError) as raised:
        load_config(file)
    assert str(raised.value).startswith(f"{file}: published.figures[0].figure: {path!r}: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ({"figure": "curve[5].rate", "value": 1.0}, "search.curve has 5 points"),
        ({"figure": "recovery.rate", "value": 1.0, "tolerance": -0.1}, "published.figures[0].tolerance"),
        ({"figure": "recovery.rate", "value": 1.0, "agree": "within"}, "did you mean 'agrees'?"),
        ({"figure": "recovery.rate"}, "published.figures[0].value: this key is required"),
    ],
)
def test_a_figure_is_refused_in_one_line(figure: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as raised:
        load_config(None, {"published": {"source": "here", "figures": [figure]}})
    assert said in str(raised.value)


def test_what_was_published_is_no_part_of_the_fingerprint() -> None:
    figures = [{"figure": "recovery.rate", "value": 1.0}]
    with_it = load_config(None, {"published": {"source": "here", "figures": figures}})
    assert with_it.published is not None
    assert with_it.fingerprint() == load_config().fingerprint()


def _made() -> Verdict:
    """Of 20 flips, with figures put in by hand."""
    made = conclude(*(flip(f"e{row}") for row in range(20)), curve=(2.0,))
    found = {"searched": 20, "rate": 0.75, "wilson95": (0.53, 0.89), "drift_mean": 0.5, "norm_mean": None}
    (point,) = made.curve
    curve = (point.model_copy(update={"rate": 0.25, "wilson95": (0.1, 0.5)}),)
    return made.model_copy(update={"recovery": made.recovery.model_copy(update=found), "curve": curve})


VERDICT = _made()


@pytest.mark.parametrize(
    ("figure", "value", "tolerance", "agrees", "expected"),
    [
        ("recovery.rate", 1.1, 0.35, "within", True),  # at the very edge, which a subtraction of decimals misses
        ("recovery.rate", 0.7, 0.05, "within", True),
        ("recovery.rate", 0.81, 0.05, "within", False),
        ("recovery.rate", 0.69, 0.05, "within", False),
        ("recovery.rate", 0.1, 0.05, "at_least", True),
        ("recovery.rate", 0.81, 0.05, "at_least", False),
        ("recovery.drift_mean", 0.78, 0.0, "at_most", True),
        ("recovery.drift_mean", 0.45, 0.04, "at_most", False),
        ("recovery.drift_mean", 0.45, None, "at_most", None),
        ("recovery.norm_mean", 0.45, 0.1, "within", None),
        ("transfer.heldout_rate", 0.45, 0.1, "within", None),
        ("curve[0].rate", 0.2, 0.05, "within", True),
        ("counts.valid_flips", 37.0, 11.0, "within", False),
    ],
)
def test_ours_agrees_within_the_tolerance_on_the_side_that_counts(
    figure: str, value: float, tolerance: float | None, agrees: Any, expected: bool | None
) -> None:
    (row,) = compared(VERDICT, [PublishedFigure(figure, value, tolerance, agrees)], "here")
    assert row.agrees is expected
    assert row.ours == lookup(VERDICT, figure)


def test_a_rate_brings_its_own_interval() -> None:
    rows = compared(VERDICT, [PublishedFigure(name, 0.0) for name in ("recovery.rate", "curve[0].rate")], "here")
    assert [row.wilson95 for row in rows] == [(0.53, 0.89), (0.1, 0.5)]
    (other,) = compared(VERDICT, [PublishedFigure("recovery.drift_mean", 0.0)], "here")
    assert other.wilson95 is None


def published(name: str, verdict: Verdict) -> Verdict:
    """A verdict with the figures of a setting beside it, as the schema has them."""
    beside = beside_published(verdict, setting(name))
    jsonschema.validate(beside.to_dict(), SCHEMA, cls=jsonschema.Draft202012Validator)
    return beside


def test_pages_show_both_figures_and_whether_they_agree() -> None:
    verdict, records = finished_runs.run(*finished_runs.flips(), **finished_runs.WHOLE)
    beside = published("ioi_gpt2", verdict)
    assert beside.model_copy(update={"published": ()}) == verdict
    rate, drift = verdict.recovery.rate, verdict.recovery.drift_mean
    assert (rate, verdict.counts.valid_flips) == (0.75, 12)
    text = " ".join(to_text(beside).split())
    assert "Published: Cui, Shen and Yang, arXiv 2606.18322, IOI on GPT-2 small" in text
    assert "DISAGREES recovery.rate: published 1 (37 of 37; 95% interval 0.906 to 1), ours 0.75" in text
    assert "ours 0.75 (95% interval 0.468 to 0.911); agrees if at least 0.906" in text
    assert f"agrees recovery.drift_mean: published 0.78, ours {drift:.3g}; agrees if at most 0.78" in text
    for page in (to_html(beside, "", records), to_markdown(beside)):
        plain = page.replace("\\", "")
        assert "recovery.rate: published 1 (37 of 37; 95% interval 0.906 to 1)" in plain
        assert "DISAGREES" in plain
    for page in (to_text(verdict), to_html(verdict, "", records), to_markdown(verdict)):
        assert "published" not in page.lower()


def test_a_run_without_a_search_measured_nothing() -> None:
    verdict, _ = finished_runs.run()
    beside = published("ioi_gpt2", verdict)
    assert (beside.verdict, verdict.recovery.reactivated_share) == ("INVALID", 0.0)
    assert [row.agrees for row in beside.published] == [None, None, None, False]
    text = to_text(beside)
    assert re.search(r"not measured +recovery\.reactivated_share: published 0\.016, ours none", text)
    assert "the run is INVALID" in text


# From a cache of the hub's layout


def ioi_files(hub: Path, tmp_path: Path) -> dict[str, Any]:
    hub_layout.put_gpt2(hub)
    return {"prompts__n": 24, "search__steps": 20}


def tpp_files(hub: Path, tmp_path: Path) -> dict[str, Any]:
    """Texts of Bias in Bios' columns, each of whose classes has words of its own."""
    draw, words = (
        random.Random(0),
        {0: "ledger tax", 1: "column plan", 2: "court brief", 6: "tooth drill", 9: "scene lens"},
    )
    common = [f"word{number}" for number in range(40)]
    rows = [
        {
            "hard_text": " ".join(draw.choice(own.split() if draw.random() < 0.25 else common) for _ in range(64)),
            "profession": number,
            "gender": 0,
        }
        for number, own in words.items()
        for _ in range(18)
    ]
    file = tmp_path / "bios.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub_layout.put_random_gemma(hub, [*common, *" ".join(words.values()).split()])
    hub_layout.put_gemma_scope(hub, folders_of(setting("tpp_gemma2")))
    return {"prompts__file": str(file), "prompts__n": 6, "clamps__features__top": 6}


def wmdp_files(hub: Path, tmp_path: Path) -> dict[str, Any]:
    hub_layout.put_letters_gemma(hub, questions=2)
    hub_layout.put_gemma_scope(hub, folders_of(setting("wmdp_bio_gemma2")), rotated=False)
    write = hub_layout.write_questions
    forget = write(tmp_path / "forget.jsonl", "old", hub_layout.FORGET, 2)
    retain = write(tmp_path / "retain.jsonl", "new", hub_layout.RETAIN, 2)
    return {
        "prompts__forget": str(forget),
        "prompts__retain": str(retain),
        "clamps__features__top": 4,
        "transfer__norms": [0.2],
    }


def refusal_files(hub: Path, tmp_path: Path, name: str, columns: list[str], n: int) -> dict[str, Any]:
    texts, file = list(ORDINARY[:n]), tmp_path / f"{name}.csv"
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(columns)
        rows.writerows([text, *("" for _ in columns[2:]), f"id-{row}"] for row, text in enumerate(texts))
    hub_layout.put_chat_gemma(hub, texts)
    hub_layout.put_gemma_scope(hub, folders_of(setting(name)))
    short = {"prompts__forced_tokens": 3, "prompts__reply_tokens": 6, "prompts__declined": 6}
    return short | {"prompts__file": str(file)}


def advbench_files(hub: Path, tmp_path: Path) -> dict[str, Any]:
    return refusal_files(hub, tmp_path, "refusal_advbench_gemma2", ["goal", "target"], 8)


def harmbench_files(hub: Path, tmp_path: Path) -> dict[str, Any]:
    columns = ["Behavior", "FunctionalCategory", "SemanticCategory", "Tags", "ContextString", "BehaviorID"]
    return refusal_files(hub, tmp_path, "refusal_harmbench_gemma2", columns, 8)


FILES: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
    "ioi_gpt2": ioi_files,
    "tpp_gemma2": tpp_files,
    "wmdp_bio_gemma2": wmdp_files,
    "refusal_advbench_gemma2": advbench_files,
    "refusal_harmbench_gemma2": harmbench_files,
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "refusal" in name else name for name in SETTINGS]
)
def test_a_setting_runs_from_a_cache_of_the_hubs_layout(
    name: str, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of models and SAEs as they stand; no look at the network."""
    changes = FILES[name](hub, tmp_path)
    monkeypatch.setattr(hubs, "hub_reachable", None)
    config = load_config(FOLDER / f"{name}.yaml", SHORT | {key.replace("__", "."): v for key, v in changes.items()})
    verdict = run_check(config, tmp_path / "out")
    jsonschema.validate(verdict.to_dict(), SCHEMA, cls=jsonschema.Draft202012Validator)
    assert verdict.counts.valid_flips > 0
    assert verdict.recovery.searched > 0
    assert list(verdict.threat_model.sites) == [site.hook_name for site in SITES[name]]
    assert verdict.provenance.model == f"{config.model} (cache, revision:{hub_layout.REVISION})"
    assert [row.figure for row in verdict.published] == [one.figure for one in config.published.figures]  # type: ignore[union-attr]
    for row in verdict.published:
        assert isinstance(row.ours, int | float), row.figure
    for page in (to_text(verdict), (tmp_path / "out" / "report.html").read_text()):
        assert "arXiv 2606.18322" in page
    assert "arXiv 2606.18322" in (tmp_path / "out" / "report.md").read_text()


def test_the_command_for_ioi_and_figures_given_later(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other published figures are told of a finished run without a second one, and its verdict stays as it is."""
    hub_layout.put_gpt2(hub)
    file, out = tmp_path / "ioi.yaml", tmp_path / "out"
    flags = ["--n", "12", "--steps", "5", "--out", str(out)]
    assert cli.main(["check", str(FOLDER / "ioi_gpt2.yaml"), *flags]) == 0
    first, before = capsys.readouterr().out, json.loads((out / "verdict.json").read_text())
    assert "Published: Cui, Shen and Yang" in first
    values = yaml.safe_load((FOLDER / "ioi_gpt2.yaml").read_text())
    values["published"] = {"source": "another", "figures": [{"figure": "counts.n", "value": 13, "tolerance": 0}]}
    file.write_text(yaml.safe_dump(values))
    monkeypatch.setattr("recover.run.runner.check", None)
    assert cli.main(["check", str(file), *flags]) == 0
    assert "counts.n: published 13, ours 12; agrees if between 13 and 13" in " ".join(capsys.readouterr().out.split())
    after = json.loads((out / "verdict.json").read_text())
    assert {key: after[key] for key in after if key != "published"} == {
        key: before[key] for key in before if key != "published"
    }
    assert [row["agrees"] for row in after["published"]] == [False]
    assert load_config(out / "config.yaml").published == load_config(file).published
    assert "another" in (out / "report.html").read_text()


def test_saes_are_taken_from_the_cache_without_a_look_at_the_network(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs, "hub_reachable", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub_layout.put_gpt2(hub)
    hub_layout.put_gemma_scope(hub, ["layer_5/width_16k/average_l0_68"])
    load = sae_lens.SAE.from_pretrained

    def offline(*args: Any, **named: Any) -> Any:
        assert constants.is_offline_mode()
        return load(*args, **named)

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", offline)
    jb = sae_names.load_sae("gpt2-small-res-jb:blocks.4.hook_resid_pre")
    assert (jb.site, jb.d_model, jb.d_sae, jb.architecture) == (Site(4, "pre"), 96, 192, "standard")
    for name in (
        "gemma-scope-2b-pt-res:layer_5/width_16k/average_l0_68",
        "gemma-scope-2b-pt-res-canonical:layer_5/width_16k/canonical",
    ):
        scope = sae_names.load_sae(name)
        assert (scope.site, scope.architecture) == (Site(5, "post"), "jumprelu")
        assert torch.equal(scope.W_dec, hub_layout.basis(hub_layout.GEMMA_WIDTH)["W_dec"])


@pytest.mark.parametrize("name", SETTINGS)
def test_without_a_hub_a_setting_ends_in_one_line(
    name: str, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert cli.main(["check", str(FOLDER / f"{name}.yaml"), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"recover: SAE '{setting(name).clamps[0].sae}' cannot be loaded")
    assert "the hub cannot be reached" in line
    assert not out.exists()


def gated(*_: Any, **__: Any) -> None:
    response = SimpleNamespace(headers={}, request=None, status_code=403)
    raise OSError("You are trying to access a gated repo.\nMake sure ...") from GatedRepoError(
        "gated", response=response
    )


def test_a_gated_repository_says_what_to_do(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hubs, "hub_reachable", lambda: True)
    monkeypatch.setattr(names.AutoConfig, "from_pretrained", gated)
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", gated)
    for load, name in ((names.resolve_model, hub_layout.GEMMA), (sae_names.load_sae, "a-release:a")):
        with pytest.raises(
            InputError, match="it is gated: accept its terms on its page at the hub, and log in"
        ) as raised:
            load(name)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("script", "name"), [("tpp", "tpp_gemma2"), ("unlearning", "wmdp_bio_gemma2")])
def test_the_scripts_of_a_setting_print_its_published_row(
    script: str,
    name: str,
    hub: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = FILES[name](hub, tmp_path)
    values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    values["published"]["rows"] |= (
        {"constrained": {"recovered": 0.987, "clean": 0.5, "reactivated": 0.0, "drift": 0.125}}
        if script == "tpp"
        else {"wmdp_bio": values["published"]["rows"]["wmdp_bio"] | {"held": 87}}
    )
    values["prompts"] |= {key.partition("__")[2]: value for key, value in changes.items() if key.startswith("prompts")}
    values["clamps"][0]["features"]["top"] = changes["clamps__features__top"]
    values["search"]["steps"] = 3
    file = tmp_path / "setting.yaml"
    file.write_text(yaml.safe_dump(values))
    monkeypatch.syspath_prepend(FOLDER.parent)
    arguments = [f"{script}.py", str(file), "--out", str(tmp_path / "points"), "--n", "2"]
    arguments += ["--budgets", "20", "--counts", "4"] if script == "tpp" else []
    monkeypatch.setattr("sys.argv", arguments)
    __import__(script).main()
    if script == "tpp":  # its tables are those of a script of their own
        monkeypatch.setattr("sys.argv", ["tpp_table.py", str(tmp_path / "points"), str(file)])
        __import__("tpp_table").main()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("published")]
    assert ("0.987" if script == "tpp" else "87/91") in line


# What the settings need of the rest


def test_an_sae_of_centered_residuals_reads_those_of_transformers() -> None:
    """GPT-2 with centered writing weights is the same function; its residuals are the others' less their mean."""
    module, centered = tiny_lm("gpt2"), tiny_lm("gpt2")
    with torch.no_grad():
        body = centered.transformer
        written = [body.wte.weight, body.wpe.weight]
        for block in body.h:
            written += [p for part in (block.attn.c_proj, block.mlp.c_proj) for p in (part.weight, part.bias)]
        unembed = centered.lm_head.weight.clone()
        centered.lm_head.weight = torch.nn.Parameter(unembed, requires_grad=False)
        for weight in written:
            weight -= weight.mean(dim=-1, keepdim=True)
    ids, site = torch.tensor([5, 9, 3, 17, 4]), Site(2, "pre")
    logits, residual = plain_forward(module, ids, read=site)
    same, without_mean = plain_forward(centered, ids, read=site)
    assert residual is not None
    assert without_mean is not None
    torch.testing.assert_close(logits, same, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(residual - residual.mean(dim=-1, keepdim=True), without_mean, atol=1e-3, rtol=1e-4)
    sae = random_sae("standard", d_model=16, apply_b_dec_to_input=True)
    as_it_is = from_sae_lens(sae)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    folded = from_sae_lens(sae)
    torch.testing.assert_close(folded.encode(residual), sae.encode(without_mean), atol=1e-2, rtol=1e-3)
    assert (as_it_is.encode(residual) - folded.encode(residual)).abs().max() > 0.1
    assert folded.sha256 == as_it_is.sha256


def test_an_answer_ends_where_the_models_own_settings_say() -> None:
    module = tiny_lm("gemma2")
    model = Model(module, SimpleNamespace(eos_token_id=1))
    for given, expected in ((None, (1,)), (1, (1,)), ([1, 107], (1, 107)), (107, (1, 107))):
        module.generation_config.eos_token_id = given
        assert stops(model) == expected


def test_ioi_prompts_of_one_template(tmp_path: Path) -> None:
    hub_layout.tiny.save_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    drawn = ioi.load(tokenizer, n=64, templates=["BABA"], frames=1)
    pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(ioi.FRAMES[0]))
    assert all(re.fullmatch(pattern, example.prompt) and example.template == "BABA" for example in drawn)
    assert len({example.prompt for example in drawn}) == 64
    assert ioi.load(tokenizer, n=64, frames=len(ioi.FRAMES)) == ioi.load(tokenizer, n=64)
    most = 60 * 59 * len(ioi.PLACES) * len(ioi.OBJECTS) // 2
    with pytest.raises(InputError, match=f"at most {most} can be drawn"):
        ioi.load(tokenizer, n=10**6, templates=["BABA"], frames=1)


# Where there is a hub


@pytest.mark.hub
def test_gpt2_small_names_the_indirect_object() -> None:
    loaded = load_setting(setting("ioi_gpt2", device="cpu"))
    (sae,) = loaded.saes.values()
    assert (sae.site, sae.d_model, sae.d_sae) == (Site(4, "pre"), 768, 24576)
    examples = loaded.examples
    with torch.no_grad():
        logits = loaded.model.run(examples.prompts, tokens=examples.behavior.tokens).logits
    assert (examples.behavior.slack(logits) > 0).float().mean() > 0.9


@pytest.mark.hub
@pytest.mark.parametrize("name", ["tpp_gemma2", "wmdp_bio_gemma2"])
def test_gemma_scope_is_where_the_setting_says(name: str) -> None:
    sae = sae_names.load_sae(setting(name).clamps[0].sae)
    assert (sae.site, sae.d_model, sae.d_sae) == (SITES[name][0], 2304, 16384)
