"""What a configuration names, loaded: model, SAEs, prompts; and the defense that is built of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from recover.defenses import selection
from recover.defenses.clamps import Clamp, Defense, Floor, Scale, Set
from recover.defenses.defended import check_fits
from recover.defenses.selection import RETAIN, attributions, contrast, contrast_of, largest
from recover.models.host import Model, Prompts
from recover.models.names import LoadedModel, resolve_model
from recover.protocol.bench import Bench
from recover.protocol.folder import RunState
from recover.protocol.plan import Plan
from recover.run.config import ClampConfig, Config, Selection
from recover.saes.names import load_sae
from recover.saes.sae import SAE
from recover.tasks import load_examples
from recover.tasks.behaviors import positions_read
from recover.tasks.examples import Examples
from recover.tasks.prose import NEUTRAL
from recover.types import InputError, Progress

MODES: dict[str, type[Set] | type[Scale] | type[Floor]] = {"set": Set, "scale": Scale, "floor": Floor}
NARROW = 1024
"""Up to this width of the residual a step of the search is too little work for several threads to share."""
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
    def budget(self) -> float:
        """Largest norm of a perturbation."""
        return float(self.config.search.budget)

    @property
    def plan(self) -> Plan:
        """What a check runs."""
        return self.config.plan()

    @property
    def neutral(self) -> Prompts:
        """Passages of ordinary text, on which the defense's cost is measured."""
        return self.model.tokenize(NEUTRAL)

    @property
    def threads(self) -> int:
        """Threads of the CPU that a run uses."""
        return threads_of(self.config, self.model)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that can change a result."""
        code, saes = _version("recover"), {f"sae:{name}": sae.sha256 for name, sae in self.saes.items()}
        return self.config.fingerprint(recover=code, model=self.loaded.version, prompts=self.examples.sha256, **saes)

    @property
    def batch_size(self) -> int:
        """How many examples to run at once: as asked, or as many as memory allows."""
        asked = self.config.batch_size
        widest = max(sae.d_sae for sae in self.saes.values())
        return asked if isinstance(asked, int) else self.model.batch_size(self.examples.prompts, widest)

    @cached_property
    def exact(self) -> Model:
        """The model in the precision in which certificates are measured."""
        if (config := self.config).dtype == config.certificates:
            return self.model
        module = resolve_model(config.model, config.device, device_map=config.device_map).module
        return Model(module.double() if config.certificates == "float64" else module, self.loaded.tokenizer)

    @property
    def provenance(self) -> dict[str, Any]:
        """Which code, weights, seed and device give the verdict."""
        loaded = self.loaded
        return {
            "versions": package_versions(),
            "seed": self.config.prompts.seed,
            "control_seed": self.config.controls.seed,
            "device": str(self.model.device),
            "dtype": self.config.dtype,
            "sae_sha256": {name: sae.sha256 for name, sae in self.saes.items()},
            "model": f"{loaded.name} ({loaded.source}, {loaded.version})",
        }

    def choose(self, batch_size: int, progress: Progress | None = None) -> list[Chosen]:
        """Select the features of each clamp (`choose_features`)."""
        return choose_features(self, batch_size, progress)

    def build(self, chosen: Sequence[Chosen]) -> Defense:
        """Build the defense of the configuration, with these features and values for its clamps.

        Raises:
            InputError: the features cannot be clamped.
        """
        pairs = zip(self.config.clamps, chosen, strict=True)
        return Defense(tuple(_clamp(one, self.saes[one.sae], of) for one, of in pairs), self.config.skip_first)


@dataclass(frozen=True)
class Chosen:
    """The features of a clamp, and its value: one for all of them, or one each."""

    features: tuple[int, ...]
    value: float | tuple[float, ...]

    @classmethod
    def kept_by(cls, state: RunState) -> list[Chosen]:
        """Read the features and values of each clamp that an earlier start selected."""
        pairs = zip(state.features, state.values, strict=True)
        return [cls(tuple(features), tuple(v) if isinstance(v, list) else v) for features, v in pairs]


def load_setting(config: Config, *, keep_text: bool = False, progress: Progress | None = None) -> Setting:
    """Load the SAEs, the model and the prompts; what is refused soonest comes first.

    Raises:
        InputError: one of them cannot be had, or they do not belong together.
    """
    saes = {name: load_sae(name) for name in dict.fromkeys(clamp.sae for clamp in config.clamps)}
    places = _placeholders(config, saes)
    loaded = resolve_model(config.model, config.device, config.dtype, config.device_map)
    model = Model(loaded.module, loaded.tokenizer)
    for place in places:
        check_fits(model, place, n_answer=1)
    saes = {name: sae.to(model.device) for name, sae in saes.items()}
    with threads(threads_of(config, model)):  # a task may train a probe, or generate
        examples = load_examples(config.task, model, progress=progress, **config.prompts.model_dump())
    for place in places:
        check_fits(model, place, n_answer=positions_read(examples.behavior) - 1)
    positions = "last" if examples.dialogue is None else "answer"
    if config.search.positions not in (None, positions):
        raise InputError(
            f"search.positions: {config.search.positions}, and the task {config.task!r} is read at its {positions} "
            f"positions; leave it out, or write {positions}"
        )
    return Setting(config, loaded, model, saes, examples if keep_text else replace(examples, texts=None))


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Let torch use this many threads of the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_of(config: Config, model: Model) -> int:
    """Threads as asked; by default one for a small model, on which more gain little and could change a digit."""
    if config.threads != "auto":
        return config.threads
    return 1 if model.device.type == "cpu" and model.d_model <= NARROW else torch.get_num_threads()


def choose_features(setting: Setting, batch_size: int, progress: Progress | None = None) -> list[Chosen]:
    """The features of each clamp, as listed or as its rule selects them on the setting's examples.

    Raises:
        InputError: a rule finds too few, or the task has nothing that it could select from.
    """
    return [_chosen(clamp, setting, batch_size, progress or (lambda *_: None)) for clamp in setting.config.clamps]


def build_bench(setting: Setting, chosen: Sequence[Chosen] | None = None, batch_size: int | None = None) -> Bench:
    """Build what the phases of a check share: the model, the examples, and the defense with the selected features.

    `chosen` and `batch_size` are those of an earlier start, if any.

    Raises:
        InputError: from `choose_features` and `Setting.build`.
    """
    size, model = batch_size or setting.batch_size, setting.model
    defense = setting.build(setting.choose(size) if chosen is None else chosen)
    models = setting.examples.read_with(model, setting.exact)
    return Bench(*models, defense, setting.examples, setting.budget, setting.plan, size, model)


def _clamp(clamp: ClampConfig, sae: SAE, chosen: Chosen) -> Clamp:
    return Clamp(sae, chosen.features, MODES[clamp.mode](chosen.value), clamp.only_active, clamp.positions)


def _placeholders(config: Config, saes: Mapping[str, SAE]) -> list[Defense]:
    """A defense for each clamp, with some feature where a rule is to select them, to see whether it can be built."""
    built = []
    for index, clamp in enumerate(config.clamps):
        features = (0,) if isinstance(clamp.features, Selection) else clamp.features
        try:
            built.append(Defense((_clamp(clamp, saes[clamp.sae], Chosen(features, clamp.value)),)))
        except InputError as error:
            reason = str(error).removeprefix("clamp: ")
            raise InputError(f"clamps[{index}], SAE {clamp.sae!r}: {reason}") from None
    return built


def _chosen(clamp: ClampConfig, setting: Setting, batch_size: int, progress: Progress) -> Chosen:
    if not isinstance(clamp.features, Selection):
        return Chosen(clamp.features, clamp.value)
    sae, rule, top = setting.saes[clamp.sae], clamp.features, clamp.features.top
    model, examples, site = setting.model, setting.examples, _clamp(clamp, sae, Chosen((0,), clamp.value)).site
    if rule.select == "attribution":
        read, _ = examples.read_with(model)
        return Chosen(largest(attributions(read, sae, site, examples, batch_size, progress), top), clamp.value)
    if rule.select == "contrast":
        kinds = contrast_of(examples, rule.select)
        more, mean = contrast(model, sae, site, kinds.shown, kinds.hidden, batch_size)
        features = largest(more, top)
        means = tuple(clamp.value * float(mean[feature]) for feature in features)
        return Chosen(features, means if clamp.unit == "mean" else clamp.value)
    retain = RETAIN if rule.retain is None else rule.retain
    features = selection.select_features(model, sae, site, examples, top, rule.select, batch_size, retain)
    return Chosen(features, clamp.value)


def package_versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    return {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # recover itself, run from a checkout
        return "not installed"
