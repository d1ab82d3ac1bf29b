"""What a configuration names, loaded: model, SAEs, prompts; and the defense that is built of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from recover.bench import Examples
from recover.check import Progress
from recover.clamp import Clamp, Defense, Floor, Scale, Set
from recover.config import ClampConfig, Config, Selection
from recover.defended import check_fits
from recover.model import Model
from recover.sae import SAE
from recover.selection import attribution, largest
from recover.tasks import get_task
from recover.types import InputError
from recover.zoo import LoadedModel, resolve_model, resolve_sae

MODES: dict[str, type[Set] | type[Scale] | type[Floor]] = {"set": Set, "scale": Scale, "floor": Floor}
PACKAGES = ("recover", "torch", "transformers", "nnsight", "sae_lens")


@dataclass(frozen=True, eq=False)
class Setting:
    """What a configuration names, loaded."""

    config: Config
    loaded: LoadedModel
    model: Model
    saes: Mapping[str, SAE]
    examples: Examples

    @property
    def fingerprint(self) -> str:
        """Of everything that can change a result."""
        identities = {
            "recover": _version("recover"),
            "model": self.loaded.version,
            "prompts": hashlib.sha256("\n".join(self.examples.ids).encode()).hexdigest(),
            **{f"sae:{name}": sae.sha256 for name, sae in self.saes.items()},
        }
        return self.config.fingerprint(**identities)

    @property
    def batch_size(self) -> int:
        """How many examples to run at once: as asked, or as many as memory allows."""
        asked = self.config.batch_size
        widest = max(sae.d_sae for sae in self.saes.values())
        return asked if isinstance(asked, int) else self.model.batch_size(self.examples.prompts, widest)

    @property
    def provenance(self) -> dict[str, Any]:
        """Which code, weights, seed and device give the verdict."""
        loaded = self.loaded
        return {
            "versions": {package: _version(package) for package in PACKAGES},
            "seed": self.config.prompts.seed,
            "control_seed": self.config.controls.seed,
            "device": str(self.model.device),
            "dtype": self.config.dtype,
            "sae_sha256": {name: sae.sha256 for name, sae in self.saes.items()},
            "model": f"{loaded.name} ({loaded.source}, {loaded.version})",
        }


def load_setting(config: Config, *, keep_text: bool = False) -> Setting:
    """Load the SAEs, the model and the prompts; what is refused soonest comes first.

    Raises:
        InputError: one of them cannot be had, or they do not belong together.
    """
    task = get_task(config.task)
    saes = {name: resolve_sae(name) for name in dict.fromkeys(clamp.sae for clamp in config.clamps)}
    places = _placeholders(config, saes)
    loaded = resolve_model(config.model, config.device, config.dtype)
    model = Model(loaded.module, loaded.tokenizer)
    for place in places:
        check_fits(model, place)
    saes = {name: sae.to(model.device) for name, sae in saes.items()}
    asked = task.load(loaded.tokenizer, **config.prompts.model_dump(exclude={"candidates"}))
    texts = [example.prompt for example in asked]
    behavior = task.behavior(loaded.tokenizer, asked, model.device)
    ids = [example.id for example in asked]
    strict = task.strict(loaded.tokenizer, asked, model.device, config.prompts.candidates)
    examples = Examples(ids, model.tokenize(texts), behavior, texts if keep_text else None, strict)
    return Setting(config, loaded, model, saes, examples)


def select_features(setting: Setting, batch_size: int, progress: Progress | None = None) -> list[tuple[int, ...]]:
    """The features of each clamp, as listed or as its rule selects them on the setting's examples.

    Raises:
        InputError: a rule finds too few.
    """
    return [_features(clamp, setting, batch_size, progress or (lambda *_: None)) for clamp in setting.config.clamps]


def build_defense(setting: Setting, features: Sequence[Sequence[int]]) -> Defense:
    """The defense of the configuration, with these features for its clamps.

    Raises:
        InputError: the features cannot be clamped.
    """
    pairs = zip(setting.config.clamps, features, strict=True)
    clamps = tuple(_clamp(clamp, setting.saes[clamp.sae], tuple(chosen)) for clamp, chosen in pairs)
    return Defense(clamps, setting.config.skip_first)


def _clamp(clamp: ClampConfig, sae: SAE, features: tuple[int, ...]) -> Clamp:
    return Clamp(sae, features, MODES[clamp.mode](clamp.value), clamp.only_active, clamp.positions)


def _placeholders(config: Config, saes: Mapping[str, SAE]) -> list[Defense]:
    """A defense for each clamp, with some feature where a rule is to select them, to see whether it can be built."""
    built = []
    for index, clamp in enumerate(config.clamps):
        features = (0,) if isinstance(clamp.features, Selection) else clamp.features
        try:
            built.append(Defense((_clamp(clamp, saes[clamp.sae], features),)))
        except InputError as error:
            reason = str(error).removeprefix("clamp: ")
            raise InputError(f"clamps[{index}], SAE {clamp.sae!r}: {reason}") from None
    return built


def _features(clamp: ClampConfig, setting: Setting, batch_size: int, progress: Progress) -> tuple[int, ...]:
    if not isinstance(clamp.features, Selection):
        return clamp.features
    sae, examples = setting.saes[clamp.sae], setting.examples
    site = _clamp(clamp, sae, (0,)).site
    total = torch.zeros(sae.d_sae, device=sae.device)
    rows = torch.arange(len(examples.ids))
    for batch in torch.split(rows, batch_size):
        part = examples.select(batch)
        total += attribution(setting.model, sae, site, part.prompts, part.behavior)
        progress("attribution", int(batch[-1]) + 1, len(rows))
    return largest(total, clamp.features.top)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # recover itself, run from a checkout
        return "not installed"
