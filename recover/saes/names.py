"""SAEs by name: those that ship with this package, folders in sae_lens's format, and `release:sae_id`.

What is in the Hugging Face cache is used with no look at the network; the hub is asked for the rest.
"""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import Any

from recover.models import hub
from recover.models.hub import hub_offline, one_line, why
from recover.models.names import shipped
from recover.saes.sae import SAE, from_sae_lens, load_sae_folder
from recover.types import InputError


def shipped_saes() -> dict[str, Path]:
    """Return the folders of the SAEs that ship with recover, by name.

    >>> "toy-choice-l1" in shipped_saes()
    True
    """
    return {path.parent.name: path.parent for path in shipped("*/cfg.json")}


def load_sae(name: str) -> SAE:
    """Load an SAE by name, on the CPU.

    Args:
        name: an SAE that recover ships (`smollm2-l15`), a folder in sae_lens's format, or `release:sae_id`.

    Raises:
        InputError: there is no such SAE, it cannot be reached, or recover does not support its kind.

    >>> load_sae("toy-choice-l1").site.hook_name
    'blocks.1.hook_resid_pre'
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
    """Load a published SAE from the cache, or from the hub where the cache lacks it."""
    try:
        with hub_offline():
            return _pretrained(release, sae_id)
    except Exception as error:  # whatever sae_lens's many loaders raise of what is not in the cache
        missing = "it is not in the cache, and the hub cannot be reached; run this where it can, or give a folder"
        reason = one_line(error) if isinstance(error, ValueError) else missing
    if hub.hub_reachable():
        try:
            return _pretrained(release, sae_id)
        except Exception as error:  # of the hub, it is about what the user named
            reason = why(error)
    raise InputError(f"SAE '{release}:{sae_id}' cannot be loaded ({reason})")


def _pretrained(release: str, sae_id: str) -> Any:
    import sae_lens  # here, because it is slow to import and serves this one kind of name

    with warnings.catch_warnings():
        # It asks for a model prepared as in training; `from_sae_lens` prepares the SAE instead.
        warnings.filterwarnings("ignore", message=r"\s*This SAE has non-empty model_from_pretrained_kwargs")
        return sae_lens.SAE.from_pretrained(release, sae_id, device="cpu")
