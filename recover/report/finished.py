"""The pages of a finished run, and reading one back from its folder.

1. `pages` turns a verdict, its records and its configuration into `report.html` and `report.md`.
2. `read_run` reads these from a folder, and refuses what is no finished run of this version in one line.
3. `rebuild_report` writes the pages again, without the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recover.protocol.folder import CONFIG, EXAMPLES, MARKDOWN, REPORT, RUN, VERDICT, write_whole
from recover.protocol.records import ExampleRecord
from recover.protocol.verdict_model import OtherSchemaError, Verdict
from recover.report.html import to_html
from recover.report.markdown import to_markdown
from recover.types import InputError

__all__ = ["FinishedRun", "find_run", "pages", "read_records", "read_run", "read_verdict", "rebuild_report"]


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as reports need it.

    Attributes:
        config: the text of `config.yaml`.
        features: of each clamp; none where `run.json` cannot be read.
    """

    path: Path
    verdict: Verdict
    config: str
    records: tuple[ExampleRecord, ...]
    features: tuple[tuple[int, ...], ...]


def pages(
    verdict: Verdict,
    config: str,
    records: Sequence[ExampleRecord],
    features: Sequence[Sequence[int]] = (),
) -> dict[str, bytes]:
    """The pages for people, by the names of their files."""
    return {
        MARKDOWN: to_markdown(verdict, config).encode(),
        REPORT: to_html(verdict, config, records, features).encode(),
    }


def read_verdict(out: Path) -> Verdict:
    """What `verdict.json` of a run holds.

    Raises:
        OtherSchemaError: it was written in another schema.
        ValueError: it is no verdict.
    """
    return Verdict.from_json((out / VERDICT).read_text(encoding="utf-8"))


def read_run(out: Path) -> FinishedRun:
    """A finished run, read back from its folder.

    Raises:
        InputError: there is no finished run, its verdict has another schema, or its files are damaged.
    """
    for name in (VERDICT, CONFIG):
        if not (out / name).is_file():
            raise InputError(f"{out}: holds no finished run ({name} is not there); run `recover check --out {out}`")
    verdict, config = _undamaged(out, VERDICT, read_verdict), _undamaged(out, CONFIG, _text(CONFIG))
    records = _undamaged(out, EXAMPLES, read_records) if (out / EXAMPLES).is_file() else ()
    return FinishedRun(out, verdict, config, records, _features(out))


def find_run(out: Path) -> FinishedRun | None:
    """The same, or None where there is something left to do, or what is there is damaged."""
    if not all((out / name).is_file() for name in (VERDICT, EXAMPLES)):
        return None
    try:
        return read_run(out)
    except InputError:
        return None


def read_records(out: Path) -> tuple[ExampleRecord, ...]:
    """The lines of `examples.jsonl`.

    Raises:
        ValueError: one of them is none of this version.
    """
    return tuple(map(ExampleRecord.from_json, (out / EXAMPLES).read_text(encoding="utf-8").splitlines()))


def rebuild_report(out: Path) -> Path:
    """Write `report.html` and `report.md` again from the artifacts in `out`; gives the path of the former.

    Raises:
        InputError: there is no finished run, or its files are damaged.
    """
    run = read_run(out)
    for name, page in pages(run.verdict, run.config, run.records, run.features).items():
        try:
            write_whole(out / name, page)
        except OSError as error:
            raise InputError(f"{out}: {name} cannot be written ({error.strerror}); copy the folder elsewhere") from None
    return out / REPORT


def _undamaged(out: Path, name: str, read: Any) -> Any:
    try:
        return read(out)
    except OtherSchemaError as error:
        raise InputError(f"{out}: {name} cannot be opened: {error}") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{out}: {name} is damaged ({reason:.120}); run `recover check` on it again") from None


def _text(name: str) -> Any:
    return lambda out: (out / name).read_text(encoding="utf-8")


def _features(out: Path) -> tuple[tuple[int, ...], ...]:
    """The clamped features; the report does without them where they cannot be read."""
    try:
        return tuple(tuple(map(int, one)) for one in json.loads((out / RUN).read_text(encoding="utf-8"))["features"])
    except (OSError, ValueError, KeyError, TypeError):
        return ()
