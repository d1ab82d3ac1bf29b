"""What every test shares: seeds, the real model, and the skipping of what this machine cannot run."""

import beartype  # noqa: F401, I001 (nnsight, imported before it, breaks the run-time shape checks)

import os

import pytest
import torch

MACHINE = {
    "gpu": (torch.cuda.is_available, "needs a CUDA device"),
    "hub": (lambda: "RECOVER_TEST_HUB" in os.environ, "set RECOVER_TEST_HUB to use the Hugging Face hub"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark, (available, reason) in MACHINE.items():
        if not available():
            for item in items:
                if item.get_closest_marker(mark) is not None:  # keywords hold the names of folders too
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32 on the CPU; downloaded the first time."""
    from recover.models import names  # not above: most tests need none of what it imports

    return names.resolve_model("smollm2", device="cpu")
