"""The Hugging Face hub: look up repositories in its cache, and test whether the hub can be reached."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError

from recover.types import InputError

PROBE_SECONDS = 3.0


def cached(repo: str) -> Path | None:
    """Return the folder of a repository in the Hugging Face cache if it holds every weight file, else None."""
    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise InputError(f"model {repo!r} is no folder and cannot be a hub id ({one_line(error)})") from None
    for weights in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{weights}.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {weights}
        if all((folder / shard).exists() for shard in shards):
            return folder
    return None


def hub_reachable() -> bool:
    """Test whether the hub answers within `PROBE_SECONDS`, in a thread because a name look-up has no time limit."""
    if constants.is_offline_mode():
        return False
    answered = threading.Event()

    def probe() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            answered.set()

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


@contextlib.contextmanager
def hub_offline(*clients: Any) -> Iterator[None]:
    """Restrict the hub's client, and `clients` with a setting of the same name, to their caches in this context."""
    before = [(one, one.HF_HUB_OFFLINE) for one in (constants, *clients)]
    try:
        for one, _ in before:
            one.HF_HUB_OFFLINE = True
        yield
    finally:
        for one, setting in before:
            one.HF_HUB_OFFLINE = setting


def why(error: BaseException) -> str:
    """Explain an error in one line; for a gated repository, say how to get access."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return "it is gated: accept its terms on its page at the hub, and log in with `hf auth login`"
        cause = cause.__cause__ or cause.__context__
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
