"""DEFENSE.yaml: which defense to check, on what, with which budget.

A file is read in four steps, and each refuses bad input with one line that names the place:

1. YAML is parsed, strictly: a key given twice is an error.
2. Overrides (the command line's flags), named by dotted paths, replace values.
3. The sections below validate keys, types and ranges.
4. `Config.canonical()` gives back everything as resolved, defaults included; `Config.fingerprint()` is its
   hash over what can change a result, by which an output folder knows whose run it holds.

Without a file the configuration is `DEFAULTS`, the setting of `analyses/ioi_smollm2.yaml`.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveInt,
    Tag,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from recover.evidence.rules import Rules
from recover.evidence.transfer import FitSchedule
from recover.protocol.plan import Plan, TransferPlan
from recover.report.published import Agreement, PublishedFigure, check_path, index_of_curve
from recover.search.ascent import Schedule
from recover.tasks import read_options
from recover.types import DeviceMap, Finite, InputError, Positions, Positive, Share, Surface

DEFAULTS: Mapping[str, Any] = {
    "model": "smollm2",
    "clamps": [
        {"sae": "smollm2-l15", "features": {"select": "attribution", "top": 64}, "mode": "set", "value": -5.0}
        | {"only_active": True, "positions": "all"}
    ],
    "skip_first": 1,
    "task": "ioi",
    "prompts": {"n": 64, "seed": 0},
    "search": {"budget": 20.0, "placement": "after_clamp"},
}

HARMLESS = ("device", "device_map", "batch_size", "threads", "published")
Of = TypeVar("Of")
Text = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        closed = cls.model_config.get("extra") == "forbid"
        for key in data if closed and isinstance(data, dict) else ():
            if key not in cls.model_fields:
                near = difflib.get_close_matches(str(key), cls.model_fields, n=1, cutoff=0.5)
                known = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(cls.model_fields)}"
                shown = str(key) if str(key).isprintable() else ascii(key)
                raise PydanticCustomError("unknown_key", f"unknown key; {known}", {"key": shown})
        return data


class Selection(_Section):
    """Features chosen by a rule rather than listed.

    `attribution`: those that the behavior owes most to. `contrast`: those that are most more active before what the
    defense is to bring about than before what it is not, such as refusals and answers. `firing`: those that are active
    on at most a share `retain` of the tokens of what is to be kept, and most often on those of what is to be forgotten.
    `effect`: those whose being more active on prompts of a kind than on others does most for what tells them apart.

    Attributes:
        select: the rule.
        top: how many features.
        retain: of `firing`: largest share of tokens of what is to be kept on which a feature may be active.
    """

    select: Literal["attribution", "contrast", "firing", "effect"]
    top: PositiveInt
    retain: Share | None = None

    @model_validator(mode="after")
    def _retain_is_of_firing(self) -> Selection:
        if self.retain is not None and self.select != "firing":
            raise ValueError("retain is for features by firing; leave it out, or select: firing")
        return self


def _features_kind(value: Any) -> str:
    return "selection" if isinstance(value, (dict, Selection)) else "indices"


class ClampConfig(_Section):
    """One clamp: which features of which SAE, and what is done to them.

    Attributes:
        sae: a name of ours (`smollm2-l15`), a folder, or `release:sae_id` as sae_lens knows them; it says which site.
        features: a list of indices, or a rule that selects them.
        mode: `set` writes the value, `scale` multiplies by it, `floor` raises to at least it.
        value: what is set, the factor, or the floor.
        unit: what `value` is in: activation, or multiples of each feature's own mean where it was selected for being
            active (features by contrast).
        only_active: leave a feature that is zero alone.
        positions: where the clamp acts: everywhere, at a prompt's last token, on the prompt, or on the answer.
    """

    sae: Text
    features: Annotated[
        Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1), Tag("indices")]
        | Annotated[Selection, Tag("selection")],
        Discriminator(_features_kind),
    ]
    mode: Literal["set", "scale", "floor"]
    value: Finite
    unit: Literal["activation", "mean"] = "activation"
    only_active: bool = True
    positions: Positions = "all"

    @field_validator("features", mode="after")
    @classmethod
    def _no_duplicates(cls, features: tuple[int, ...] | Selection) -> tuple[int, ...] | Selection:
        if isinstance(features, tuple) and len(set(features)) < len(features):
            twice = next(feature for feature in features if features.count(feature) > 1)
            raise ValueError(f"feature {twice} is listed more than once")
        return features

    @model_validator(mode="after")
    def _means_are_of_a_contrast(self) -> ClampConfig:
        if self.unit == "mean" and not (isinstance(self.features, Selection) and self.features.select == "contrast"):
            raise ValueError("unit: mean is for features by contrast; write unit: activation, or select: contrast")
        return self


class PromptConfig(_Section):
    """Which prompts: how many, drawn with which seed, or the first `n` of a file; and whatever else the task takes.

    What the keys are and what they may be is said by the task's function (`recover.tasks`).

    Attributes:
        n: how many; all that the task has, or its own default, where it is not given.
        seed: of what the task draws.
        file: your own prompts, where the task reads some.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    n: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    file: Text | None = None


def _taken(owner: type, *names: str) -> dict[str, Any]:
    """Fields of a dataclass as fields of a section: types with their ranges, and defaults. All of them by default."""
    hints, default = get_type_hints(owner, include_extras=True), owner()
    return {name: (hints[name], getattr(default, name)) for name in names or hints}


def _section(**keys: Any) -> Any:
    """Make the base of a section whose keys are those of dataclasses (`_taken`)."""
    return create_model("Section", __base__=_Section, **keys)


_SEARCH: Any = _section(
    budget=(Positive, ...),
    **_taken(Surface, "placement"),
    positions=(Literal["last", "answer"] | None, None),
    **_taken(Surface, "sites"),
    **_taken(Schedule, "steps", "restarts"),
    **_taken(Plan, "curve"),
)
_TRANSFER: Any = _section(
    **_taken(TransferPlan, "norms", "folds", "splits", "rules", "scales", "shuffles", "draws"),
    **_taken(FitSchedule, "steps"),
)
_CONTROLS: Any = _section(
    **_taken(Plan, "seed", "random_draws", "planted_routes", "placebo_features", "max_loss_increase")
)
_RULES: Any = _section(**_taken(Rules))


class SearchConfig(_SEARCH):
    """Where a perturbation may be added, how large it may be, and how long it is searched for.

    Attributes:
        budget: largest Frobenius norm of a perturbation, over positions and dimensions.
        placement: whether it enters after the clamp or before it.
        positions: follow from the task: the last one of a prompt, or those of an answer; given, they must agree.
        sites: where it enters: the first clamped site, or every one, where the clamped features can be pinned exactly.
    """


class ControlConfig(_CONTROLS):
    """The controls of a check, and the seed of all that is drawn beside the prompts."""


class TransferConfig(_TRANSFER):
    """Shared perturbations: their sizes, as shares of the residual's norm, and how they are fitted and read."""


class RuleConfig(_RULES):
    """Thresholds of the rules of evidence (`recover.evidence.rules`)."""


class FigureConfig(_Section):
    """A figure as published (`recover.report.published`).

    Attributes:
        figure: where ours stands in `verdict.json`, such as `recovery.rate`.
        value: as published.
        tolerance: how far ours may lie from it; without one the two only stand side by side.
        agrees: on either side (`within`), or below it and anywhere above (`at_least`), or above and anywhere below
            (`at_most`).
        n: of how many examples it is a share.
    """

    figure: Text
    value: Finite
    tolerance: Annotated[Finite, Field(ge=0)] | None = None
    agrees: Agreement = "within"
    n: PositiveInt | None = None

    @field_validator("figure", mode="after")
    @classmethod
    def _is_of_a_verdict(cls, figure: str) -> str:
        try:
            check_path(figure)
        except InputError as error:
            raise ValueError(str(error)) from None
        return figure


class PublishedConfig(_Section):
    """What was published on this setting. It changes no result, and stands beside ours.

    Attributes:
        source: where it was published.
        figures: those that a verdict has too.
        rows: those that it does not have, by name and column; the scripts in `analyses` print them.
    """

    source: Text
    figures: Annotated[tuple[FigureConfig, ...], Field(strict=False)] = ()
    rows: dict[str, dict[str, Finite]] = {}

    def known(self) -> list[PublishedFigure]:
        """The figures, to be compared."""
        return [PublishedFigure(**one.model_dump()) for one in self.figures]


class Config(_Section):
    """A whole DEFENSE.yaml, validated.

    Attributes:
        model: a name of ours (`smollm2`, `toy-choice`), a hub id or a local folder.
        clamps: the defense; what several clamps at one site edit, they edit together.
        skip_first: tokens at a prompt's start that clamps leave alone.
        task: `ioi`, `cloze`, `choice`, `probe`, `refusal`, or `python:module:object`.
        prompts: which examples of the task.
        search: the perturbation that is looked for.
        controls: what is run beside the search.
        transfer: shared perturbations.
        rules: thresholds of the rules of evidence.
        dtype: of the model; the SAE, perturbations and certificates are in float32 at least.
        certificates: the dtype of the model that certificates replay in.
        device: `auto`, `cpu`, `mps`, `cuda` or `cuda:N`.
        device_map: how transformers spreads a model that one card cannot hold over all, in the place of `device`.
        batch_size: examples at once; `auto` is as many as memory allows.
        threads: of the CPU; `auto` is one for a small model, on which more gain little, and torch's own number else.
        published: figures of a publication, to stand beside ours.
    """

    model: Text
    clamps: Annotated[tuple[ClampConfig, ...], Field(strict=False, min_length=1)]
    skip_first: NonNegativeInt = 0
    task: Text
    prompts: PromptConfig = PromptConfig()
    search: SearchConfig
    controls: ControlConfig = ControlConfig()
    transfer: TransferConfig = TransferConfig()
    rules: RuleConfig = RuleConfig()
    published: PublishedConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    certificates: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    device_map: DeviceMap | None = None
    batch_size: int | Literal["auto"] = "auto"
    threads: int | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _every_site_is_after_the_clamps(self) -> Config:
        if self.search.sites == "every" and self.search.placement != "after_clamp":
            raise ValueError("search.placement: a delta at every clamped site enters after the clamps; use after_clamp")
        return self

    @model_validator(mode="after")
    def _published_points_are_of_the_curve(self) -> Config:
        for one in () if self.published is None else self.published.figures:
            index, points = index_of_curve(one.figure), len(self.search.curve)
            if index is not None and index >= points:
                raise ValueError(f"published: {one.figure}: search.curve has {points} points, counted from 0")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> Config:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device_map: it says where the model is, and so does device; leave one of them out")
        return self

    @field_validator("device", mode="plain")
    @classmethod
    def _device(cls, value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise ValueError("must be auto, cpu, mps, cuda or cuda:N")
        return value

    @field_validator("batch_size", "threads", mode="plain")
    @classmethod
    def _auto_or_a_count(cls, value: Any) -> Any:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError("must be auto or a whole number from 1")
        return value

    def with_control_seed(self, seed: int) -> Config:
        """Set another seed of the search, the split and the controls."""
        return self.model_copy(update={"controls": self.controls.model_copy(update={"seed": seed})})

    def plan(self) -> Plan:
        """Give what a check is told of the sections `search`, `controls`, `transfer` and `rules`."""
        search, transfer = self.search.model_dump() | self.controls.model_dump(), self.transfer.model_dump()
        return _filled(
            Plan,
            search,
            schedule=_filled(Schedule, search),
            surface=_filled(Surface, search),
            transfer=_filled(TransferPlan, transfer, fit=_filled(FitSchedule, transfer)),
            rules=_filled(Rules, self.rules.model_dump()),
        )

    def canonical(self) -> dict[str, Any]:
        """Everything as resolved, in plain YAML types."""
        return self.model_dump(mode="json")

    def dump_yaml(self) -> str:
        """Give `config.yaml` as resolved; `load_config` reads it back to an equal configuration."""
        return yaml.safe_dump(self.canonical(), sort_keys=False)

    def relevant(self) -> dict[str, Any]:
        """What of the configuration can change a result by more than rounding."""
        return {key: value for key, value in self.canonical().items() if key not in HARMLESS}

    def fingerprint(self, **identities: str) -> str:
        """SHA-256 of what can change a result, with hashes of what is only named, such as `model` or `prompts`."""
        return hashlib.sha256(json.dumps([self.relevant(), identities], sort_keys=True).encode()).hexdigest()


def _filled(owner: type[Of], values: Mapping[str, Any], **more: Any) -> Of:
    """Make a dataclass of those of the values that are its fields."""
    return owner(**{one.name: values[one.name] for one in fields(owner) if one.name in values}, **more)  # type: ignore[arg-type]


def load_config(path: Path | str | None = None, overrides: Mapping[str, Any] | None = None) -> Config:
    """Read and validate a configuration.

    Args:
        path: a DEFENSE.yaml; None starts from `DEFAULTS`. Paths inside it are relative to the working folder.
        overrides: values by dotted path, such as `{"search.budget": 5.0, "clamps.value": 0.0}`; a path that
            starts with `clamps.` changes every clamp; None leaves a value as it is.

    Raises:
        InputError: the file cannot be read, or what it says cannot be used; one line.
    """
    data = copy.deepcopy(dict(DEFAULTS)) if path is None else _read_yaml(Path(path))
    for key, value in (overrides or {}).items():
        if value is not None:
            _override(data, key.split("."), value)
    source = " and ".join([str(path)] * (path is not None) + ["flags"] * bool(overrides))
    within: tuple[str, ...] = ()
    try:
        config = Config.model_validate(data)
        within = ("prompts",)
        read_options(config.task, config.prompts.model_dump())
    except ValidationError as error:
        raise InputError(f"{source}: {_first_line(error, *within)}") from None
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    return config


def _override(data: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, last = path
    nodes = [data]
    for parent in parents:
        children = [node.setdefault(parent, {}) for node in nodes]
        flat = [item for child in children for item in (child if isinstance(child, list) else [child])]
        # Anything else in a section's place is left for validation to name.
        nodes = [node for node in flat if isinstance(node, dict)]
    for node in nodes:
        node[last] = value


MESSAGES = {
    "missing": "this key is required",
    "model_type": "must be a section of keys",
    "string_too_short": "must not be empty",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
}


def _first_line(error: ValidationError, *within: str) -> str:
    first = error.errors(include_url=False)[0]
    parts = [part for part in (*within, *first["loc"]) if part not in ("indices", "selection")]
    parts += [first["ctx"]["key"]] if first["type"] == "unknown_key" else []
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
    message = MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    given = first["input"]
    shown = f" (given: {given!r:.40})" if isinstance(given, (str, int, float)) else ""
    told = f"{message.replace('Input should be', 'must be')}{shown}"
    return f"{where}: {told}" if where else told  # what is said of the whole file names its place itself


class _Loader(yaml.SafeLoader):
    """YAML's safe types, with `1e-3` a number and no key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}{line}: not valid YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: must hold keys such as 'model' and 'clamps', not {type(data).__name__}")
    return data
