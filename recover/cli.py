"""The command line: `recover init`, `check`, `report`, `compare`, `selftest` and `verify`.

Exit status: 0 the command ran, whatever the verdict; 1 a `--fail-if` condition holds, the selftest missed, or a law is
broken; 2 unusable input, explained in one line; 130 interrupted (run the same command again to resume).
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, get_args

from recover.checks.verification import fitting, stand_in, supported, told, verify
from recover.models.host import Model
from recover.models.names import resolve_model
from recover.planted import KINDS, MIXTURES
from recover.planted.selftest import run_selftest, selftest_report, to_json
from recover.protocol.workers import LostWorkerError, joined
from recover.report import compare, read_run, rebuild_report, seeds_to_text, to_text, write_figures
from recover.run.config import load_config
from recover.run.progress import shown
from recover.run.runner import run_check, run_seeds
from recover.saes.names import load_sae
from recover.tasks.prose import NEUTRAL
from recover.types import DeviceMap, InputError, Site

CONDITIONS = {"recoverable": "RECOVERABLE", "inconclusive": "INCONCLUSIVE", "invalid": "INVALID"}
UNUSABLE, INTERRUPTED = 2, 130
PROMPTS_VERIFIED = 4
SHORT = len("sha256:") + 12
MODEL_NAMED = "a built-in name (smollm2, gemma3-270m), a hub id, a local folder or a .gguf file"
SAE_NAMED = "a built-in name (smollm2-l15), a local folder, or release:sae_id"
SPREAD = "how to spread a model over all GPUs when one cannot hold it"
# The flags that override DEFENSE.yaml: flag, dotted key, type, choices, help.
OVERRIDES: tuple[tuple[str, str, type, tuple[str, ...] | None, str], ...] = (
    ("--model", "model", str, None, MODEL_NAMED),
    ("--sae", "clamps.sae", str, None, SAE_NAMED),
    ("--mode", "clamps.mode", str, ("set", "scale", "floor"), "how the clamp edits a feature"),
    ("--value", "clamps.value", float, None, "the value to set, the factor, or the floor"),
    ("--positions", "clamps.positions", str, ("all", "last", "prompt", "answer"), "where the clamp acts"),
    ("--skip-first", "skip_first", int, None, "tokens at the start of each prompt that the clamp leaves alone"),
    ("--task", "task", str, None, "the behavior to test (ioi, choice, cloze, refusal)"),
    ("--n", "prompts.n", int, None, "number of prompts"),
    ("--seed", "prompts.seed", int, None, "seed for choosing the prompts"),
    ("--control-seed", "controls.seed", int, None, "seed for the search, the transfer split and the controls"),
    ("--prompts", "prompts.file", str, None, "file of your own prompts"),
    ("--budget", "search.budget", float, None, "largest norm allowed for a perturbation"),
    ("--placement", "search.placement", str, ("after_clamp", "before_clamp"), "where a perturbation enters"),
    ("--sites", "search.sites", str, ("first", "every"), "where it enters: the first clamped site, or every one"),
    ("--steps", "search.steps", int, None, "largest number of search steps"),
    ("--dtype", "dtype", str, ("float32", "bfloat16"), "number format of the model"),
    ("--device", "device", str, None, "where to run: auto, cpu, cuda, cuda:N or mps"),
    ("--device-map", "device_map", str, get_args(DeviceMap), SPREAD),
)


class Parser(argparse.ArgumentParser):
    """argparse, with mistakes reported in one line."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse an unknown argument and name the nearest known one."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(flag, re.findall(r"--[a-z-]+", self.format_usage()), n=1)
            self.error(f"unknown argument {flag!r}" + (f", did you mean {near[0]}?" if near else ""))
        return known, unknown

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(UNUSABLE)


def parser() -> argparse.ArgumentParser:
    """All commands and flags."""
    top = Parser(prog="recover", description="With SAE features clamped, can the behavior still be recovered?")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    check = commands.add_parser(
        "check",
        help="check a defense: print the verdict, write the artifacts to --out",
        description="Check a defense. Flags override DEFENSE.yaml; flags for clamps apply to every clamp.",
        epilog="Exit status: 0 the check ran; 1 a --fail-if condition holds; 2 unusable input, explained in one line; "
        "130 interrupted (run the same command again to resume).",
    )
    check.add_argument("defense", nargs="?", type=Path, metavar="DEFENSE.yaml", help="default: 64 features on IOI")
    check.add_argument("--out", type=Path, required=True, help="folder for the artifacts; an interrupted run resumes")
    for flag, key, kind, choices, text in OVERRIDES:
        metavar = None if choices else flag.removeprefix("--").replace("-", "_").upper()
        check.add_argument(flag, dest=key, type=kind, choices=choices, metavar=metavar, help=text)
    check.add_argument("--features", help="feature indices, such as 3,17,42, or top:N by attribution")
    check.add_argument(
        "--only-active", action=argparse.BooleanOptionalAction, help="edit only features that are active"
    )
    check.add_argument("--batch-size", help="examples per batch (default: as many as fit in memory)")
    check.add_argument("--threads", help="CPU threads (default: one for small models, which gain little from more)")
    seeds: dict[str, Any] = {"type": positive, "metavar": "N"}
    check.add_argument("--seeds", **seeds, default=1, help="run N control seeds and count the verdicts")
    check.add_argument("--keep-text", action="store_true", help="include the text of prompts in the artifacts")
    failing = "exit with status 1 on this verdict; repeatable"
    check.add_argument("--fail-if", action="append", choices=CONDITIONS, default=[], help=failing)
    report = commands.add_parser("report", help="rebuild report.html and report.md from the artifacts of a run")
    report.add_argument("dir", type=Path, metavar="DIR", help="folder of a finished run")
    report.add_argument(
        "--figures", type=Path, metavar="OUT", help="write figures for a paper to OUT: PDF, PNG and CSV"
    )
    laws = commands.add_parser(
        "verify",
        help="test your model and SAE against the laws that checks rely on",
        description="Test a model and an SAE, on a few neutral prompts, against the laws that checks rely on.",
        epilog="Exit status: 0 every applicable law holds; 1 a law is broken; 2 unusable input, explained in one line. "
        "An SAE that fits the model badly is reported, but breaks no law.",
    )
    laws.add_argument("--model", required=True, help=MODEL_NAMED)
    laws.add_argument("--sae", help=f"{SAE_NAMED} (default: a random one)")
    laws.add_argument("--site", help="such as blocks.4.hook_resid_pre (default: the SAE's, or the middle layer)")
    laws.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="number format of the model")
    laws.add_argument("--device", default="auto", help="where to run: auto, cpu, cuda, cuda:N or mps")
    laws.add_argument("--device-map", choices=get_args(DeviceMap), help=SPREAD)
    start = commands.add_parser("init", help="write defense.yaml and test_defense.py to edit and run with pytest")
    start.add_argument("dir", type=Path, nargs="?", default=Path(), metavar="DIR", help="default: the current folder")
    beside = commands.add_parser("compare", help="compare finished runs side by side")
    beside.add_argument("dirs", type=Path, nargs="+", metavar="DIR", help="folders of finished runs, two or more")
    planted = commands.add_parser(
        "selftest",
        help="test the checker on planted models whose answer is known",
        description="Check small planted models whose answer is known, and compare the verdicts with it.",
        epilog="Exit status: 0 no miss; 1 a miss; 2 unusable input, explained in one line.",
    )
    planted.add_argument("--seeds", **seeds, default=20, help="planted models of each kind (default: 20)")
    planted.add_argument("--mixtures", action="store_true", help="include mixtures of the kinds")
    planted.add_argument("--json", type=Path, metavar="FILE", help="write every outcome to FILE")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    warnings.filterwarnings("ignore", module=r"(transformers|sae_lens|nnsight|torch).*")
    options = parser().parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except InputError as error:
        print("recover:", " ".join(str(error).splitlines()), file=sys.stderr)
        return UNUSABLE
    except LostWorkerError as error:
        print(f"recover: {error}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("recover: interrupted; run the same command again to resume", file=sys.stderr)
        return INTERRUPTED


def overrides(options: argparse.Namespace) -> dict[str, Any]:
    """The values of the flags by dotted key; None for a flag that was not given.

    Raises:
        InputError: `--features` cannot be read.
    """
    given = {key: getattr(options, key) for _, key, *_ in OVERRIDES}
    given["clamps.only_active"] = options.only_active
    given["clamps.features"] = None if options.features is None else _features(options.features)
    for name in ("batch_size", "threads"):
        count = getattr(options, name)
        given[name] = int(count) if count is not None and count.isdecimal() else count
    return given


def _features(text: str) -> Any:
    rule, _, count = text.partition(":")
    try:
        if rule == "top":
            return {"select": "attribution", "top": int(count)}
        return [int(index) for index in text.split(",")]
    except ValueError:
        raise InputError(f"--features {text!r}: give indices, such as 3,17,42, or top:64") from None


def _check(options: argparse.Namespace) -> int:
    with joined() as workers:
        with workers.together():
            config = load_config(options.defense, overrides(options))
        given: dict[str, Any] = {"keep_text": options.keep_text, "workers": workers}
        with shown() if workers.leads else contextlib.nullcontext() as given["progress"]:
            if options.seeds == 1:
                verdicts = [run_check(config, options.out, **given)]
            else:
                verdicts = run_seeds(config, options.out, options.seeds, **given)
        if workers.leads:
            text = to_text(verdicts[0]) if options.seeds == 1 else seeds_to_text(verdicts)
            _say(f"{text}\n\nArtifacts: {options.out}")
    failing = {CONDITIONS[condition] for condition in options.fail_if}
    return int(any(verdict.verdict in failing for verdict in verdicts))


def _report(options: argparse.Namespace) -> int:
    _say(str(rebuild_report(options.dir)))
    if options.figures is not None:
        write_figures(read_run(options.dir), options.figures)
        _say(str(options.figures))
    return 0


def _compare(options: argparse.Namespace) -> int:
    _say(compare(options.dirs))
    return 0


def _init(options: argparse.Namespace) -> int:
    templates = resources.files("recover.run") / "templates"
    files = {
        options.dir / name.removesuffix(".txt"): templates / name for name in ("defense.yaml", "test_defense.py.txt")
    }
    for path in files:
        if path.exists():
            raise InputError(f"{path}: already exists; move it or give another folder")
    try:
        options.dir.mkdir(parents=True, exist_ok=True)
        for path, template in files.items():
            path.write_text(template.read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise InputError(f"{options.dir}: cannot be written ({error.strerror}); give another folder") from None
    yaml, test = files
    _say(f"{yaml}\n{test}\nEdit the two marked lines of {yaml}, then run `pytest {test}`.")
    return 0


def _selftest(options: argparse.Namespace) -> int:
    if options.json is not None and not options.json.parent.is_dir():
        raise InputError(f"--json {options.json}: the folder {options.json.parent} does not exist")
    with shown() as progress:
        kinds = (*KINDS, *MIXTURES) if options.mixtures else tuple(KINDS)
        outcomes = run_selftest(range(options.seeds), kinds, progress=progress)
    if options.json is not None:
        try:
            options.json.write_text(json.dumps(to_json(outcomes), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"--json {options.json}: cannot be written ({error.strerror})") from None
    _say(selftest_report(outcomes))
    return int(any(outcome.miss for outcome in outcomes))


def _verify(options: argparse.Namespace) -> int:
    site = None if options.site is None else Site.from_hook_name(options.site)
    given = None if options.sae is None else load_sae(options.sae)
    loaded = resolve_model(options.model, options.device, options.dtype, options.device_map)
    model = Model(loaded.module, loaded.tokenizer)
    prompts = model.tokenize(NEUTRAL[:PROMPTS_VERIFIED])
    sae = stand_in(model, prompts, site or Site(model.n_layers // 2)) if given is None else given
    laws = verify(model, sae, prompts, site)
    named = "a random SAE (no --sae given)" if given is None else f"SAE {options.sae}"
    place = site or sae.site
    fits = fitting(model, sae, model.tokenize(NEUTRAL), place) if given is not None and place is not None else []
    lines = [
        f"{loaded.name} ({loaded.source}, {loaded.version[:SHORT]}) in {options.dtype} on {model.device}",
        f"{named} at {place.hook_name if place else 'no site'}",
    ]
    _say("\n".join([*lines, told(laws, [*fits, *supported(model, laws)])]))
    return int(any(law.holds is False for law in laws))


COMMANDS = {
    "check": _check,
    "compare": _compare,
    "init": _init,
    "report": _report,
    "selftest": _selftest,
    "verify": _verify,
}


def positive(text: str) -> int:
    """Parse a positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def _say(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader, such as `head`, has gone; the exit status still tells
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
