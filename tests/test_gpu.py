"""A GPU against the CPU (`analyses/gpu.py`, `gpu_cost.py`), where there is one; anywhere the comparisons, and a
pretended device.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from recover.checks.verification import verify
from recover.models.host import Model
from recover.models.names import resolve_model
from recover.protocol.verdict_model import Verdict
from recover.report import filled
from recover.run.config import load_config
from recover.saes.names import load_sae
from recover.tasks import NEUTRAL
from recover.types import InputError
from tests import finished_runs, tiny
from tests.models import left_padded, tiny_lm
from tests.split import split
from tests.test_verify import ROWS, sae

ROOT = Path(__file__).parent.parent
TASKS = ("ioi", "cloze", "choice", "refusal", "probe")


@pytest.fixture(scope="module")
def gpu() -> Any:
    """`analyses/gpu.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analyses"))
        return __import__("gpu")


@pytest.fixture(scope="module")
def cost() -> Any:
    """`analyses/gpu_cost.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "analyses"))
        return __import__("gpu_cost")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def light(folder: Path) -> dict[str, Any]:
    """What makes the tiny defense's check as short as it gets."""
    less = {"search.steps": 4, "transfer.steps": 2, "controls.random_draws": 4, "transfer.draws": 2}
    (folder / "light.yaml").write_text(load_config(folder / "defense.yaml", less).dump_yaml())
    return less


@pytest.fixture(scope="module")
def figures() -> Any:
    names = ("n", "base", "defended", "valid_flips", "recovered", "norm_mean", "median", "displacement")
    return dict(zip(names, (64, 62, 17, 45, 44, 6.0, 4.0, 74.0), strict=True))


def test_figures_are_read_from_a_verdict(gpu: Any) -> None:
    verdict, _ = finished_runs.run(*finished_runs.flips())
    assert verdict.minimum_norm is not None
    found = gpu.figures(verdict)
    assert found == {
        **{name: getattr(verdict.counts, name) for name in ("n", "base", "defended", "valid_flips")},
        "recovered": verdict.recovery.recovered,
        "norm_mean": verdict.recovery.norm_mean,
        "median": verdict.minimum_norm.median,
        "displacement": verdict.recovery.clamp_displacement_mean,
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"recovered": 43, "norm_mean": 6.29}, []),
        ({"valid_flips": 43}, ["valid_flips: 45 and 43, 1 apart allowed"]),
        ({"median": 4.21}, ["median: 4 and 4.21, 5% apart allowed"]),
        ({"median": float("nan")}, ["median: 4 and nan, 5% apart allowed"]),
        ({"median": None}, ["median: 4.0 and None"]),
    ],
)
def test_what_is_too_far_apart_is_said(gpu: Any, figures: Any, changes: dict[str, Any], said: list[str]) -> None:
    assert gpu.apart(figures, figures | changes) == said


@pytest.mark.parametrize("task", TASKS)
def test_the_small_checks_are_of_the_shipped_defenses(gpu: Any, task: str) -> None:
    config = gpu.small(task)
    assert config.task == task
    assert config.prompts.model_dump()["n"] <= 24
    assert set(TASKS) == set(gpu.SMALL)


def test_two_devices_are_compared_and_two_precisions(gpu: Any, folder: Path, light: dict[str, Any]) -> None:
    config = load_config(folder / "light.yaml")
    ours, theirs, said = gpu.against(config, "cpu")
    assert (ours, said) == (theirs, [])
    assert ours["valid_flips"] >= 1
    _, half, said = gpu.against(config, "cpu", "bfloat16")
    assert said == []
    assert half["norm_mean"] != ours["norm_mean"]  # it was in another precision


def test_what_a_graph_keeps_is_counted(cost: Any) -> None:
    """The outputs of tanh and exp, 100 numbers of 4 bytes each; the leaf was there before."""
    leaf = torch.randn(100, requires_grad=True)
    assert cost.held(lambda: leaf.tanh().exp().sum().backward(), torch.device("cpu")) == 800


@pytest.mark.model
@pytest.mark.slow
def test_attribution_takes_no_more_memory_than_is_counted_on(cost: Any, smollm2: Any) -> None:
    model = Model(smollm2.module, smollm2.tokenizer)
    prompts = model.tokenize(["The kettle had just boiled when the rain began.", "Water freezes at zero degrees."])
    used, counted = cost.memory(model, load_sae("smollm2-l15"), prompts)
    assert counted / 10 < used <= counted


@pytest.mark.parametrize("name", ["tasks", "cost"])
def test_a_page_is_filled_between_its_marks(name: str) -> None:
    page = (ROOT / "analyses" / "gpu.md").read_text(encoding="utf-8")
    once = filled(page, name, "| ioi | 1 of 2 | agree |")
    assert "| ioi | 1 of 2 | agree |" in once
    assert filled(once, name, "| ioi | 1 of 2 | agree |") == once
    assert once.startswith(page.partition(f"<!-- {name} -->")[0])
    with pytest.raises(InputError, match="needs the marks"):
        filled("none", name, "")


@pytest.mark.slow
def test_the_benchmark_takes_a_device(cost: Any, folder: Path, light: dict[str, Any]) -> None:
    rows = cost.benchmark("benchmark.py", "cpu", f"{folder / 'light.yaml'} --flips 1")
    assert [row["name"] for row in rows] == ["published, projected", "recover"]
    assert rows[1]["recovered"] == 1


def on_pretended(*command: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: PyTorch's spare device is registered for good."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


MIXED = """
from tests import pretend
kept = pretend.register()
import torch
x = torch.arange(4.0, device=pretend.DEVICE)
assert x.device.type == "pretend" and (2 * x + x[torch.tensor([3])]).tolist() == [3.0, 5.0, 7.0, 9.0]
for wrong in (lambda: x + torch.ones(4), lambda: torch.ones(4)[x.long()], x.numpy):
    try:
        wrong()
    except (RuntimeError, TypeError):
        continue
    raise SystemExit("a tensor of the CPU met one of the device")
"""


def test_the_pretended_device_refuses_the_cpus_tensors() -> None:
    done = on_pretended("-c", MIXED)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_whole_check_keeps_to_its_device(gpu: Any, folder: Path, light: dict[str, Any], tmp_path: Path) -> None:
    done = on_pretended("-m", "tests.pretend", "check", str(folder / "light.yaml"), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    verdict = Verdict.from_json((tmp_path / "run" / "verdict.json").read_text())
    assert verdict.provenance.device == "pretend:0"
    assert gpu.apart(gpu.measure(load_config(folder / "light.yaml")), gpu.figures(verdict)) == []


@pytest.mark.slow
def test_a_model_that_is_split_over_devices_keeps_the_laws() -> None:
    done = on_pretended("-m", "tests.split")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_gpu_gives_the_figures_of_the_cpu(gpu: Any, task: str) -> None:
    ours, _, said = gpu.against(gpu.small(task), "cuda")
    assert said == []
    assert ours["valid_flips"] >= 1


@pytest.mark.gpu
@pytest.mark.model
@pytest.mark.slow
def test_bfloat16_on_a_gpu_gives_nearly_the_figures_of_float32(gpu: Any) -> None:
    assert gpu.against(gpu.small("ioi"), "cuda", "bfloat16")[2] == []


@pytest.mark.gpu
@pytest.mark.model
def test_memory_on_a_gpu_is_bounded(cost: Any) -> None:
    loaded = resolve_model("smollm2", "cuda")
    model = Model(loaded.module, loaded.tokenizer)
    prompts = model.tokenize(NEUTRAL)
    used, counted = cost.memory(model, load_sae("smollm2-l15").to(model.device), prompts)
    assert 0 < used <= counted


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_model_on_two_gpus_keeps_the_laws(first: int) -> None:
    module = split(tiny_lm(scale=4.0).to("cuda:0"), first, "cuda:1")
    prompts = left_padded(ROWS)
    here = replace(prompts, ids=prompts.ids.to("cuda:0"), mask=prompts.mask.to("cuda:0"))
    assert {law.holds for law in verify(Model(module), sae(), here)} == {True}


@pytest.mark.gpu
@pytest.mark.model
@pytest.mark.slow
def test_the_benchmarks_run_on_a_gpu_and_ours_recovers_no_fewer(cost: Any) -> None:
    theirs, ours = cost.benchmark("benchmark.py", "cuda")
    assert ours["recovered"] >= theirs["recovered"]
    assert ours["recovered"] >= 1
    rows = cost.benchmark("benchmark_refusal.py", "cuda")
    shares = [rows[name]["base_like"] / rows[name]["n"] for name in ("published", "ours")]
    assert shares[1] >= shares[0]
