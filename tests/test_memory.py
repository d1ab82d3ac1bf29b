"""How many prompts fit into memory."""

from __future__ import annotations

import pytest
import torch

from recover.models import capacity
from recover.models.capacity import free_memory, prompts_at_once

CPU = torch.device("cpu")


def at_once(**changes: int) -> int:
    sizes = {"n_layers": 10, "d_model": 8, "d_sae": 0, "pos": 5} | changes
    return prompts_at_once(None, **sizes, device=CPU)


def test_the_count_is_half_of_memory_over_the_widest_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 layers x 5 positions x (14 x 8 + 6 x 32 + 3 x 1 x 5) numbers of 4 bytes: 63,800 bytes a prompt."""
    monkeypatch.setattr(capacity, "free_memory", lambda _: 2 * 63_800 * 7)
    assert at_once() == 7
    monkeypatch.setattr(capacity, "free_memory", lambda _: 2 * 63_800 * 7 - 1)
    assert at_once() == 6


def test_wider_saes_and_longer_prompts_leave_room_for_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda _: 10**7)
    assert at_once(d_sae=4096) < at_once(pos=10) < at_once() <= capacity.MOST_AT_ONCE


def test_one_prompt_always_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "free_memory", lambda _: 0)
    assert at_once() == 1


@pytest.mark.parametrize(("limit", "free"), [("5000", 2000), ("max", None), ("nonsense", None), ("99" * 12, None)])
def test_a_containers_limit_counts(limit, free, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The machine has a million bytes; the container may use 5,000 of which 3,000 are in use."""
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text("3000\n")
    monkeypatch.setattr(capacity, "CGROUP", tmp_path)
    monkeypatch.setattr(capacity.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 10**6}))
    assert free_memory(CPU) == (free or 10**6)


def test_workers_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight workers: an eighth of the machine's memory each, and half of each of four cards."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(capacity, "_free", lambda _: 10**6)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert free_memory(CPU) == 125_000
    assert free_memory(torch.device("cuda:1")) == 500_000
