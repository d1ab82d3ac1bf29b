"""What a check keeps of each example: plain numbers, written as one JSON line, read back exactly.

A verdict is computed from records alone, so that a resumed run and an uninterrupted one cannot differ. Floats are
written with as many digits as Python needs to read the same float back. What is not finite (no threshold; a clamp that
overflows) becomes null, which JSON has and reads as NaN where a number must be.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter

from recover.certify import Certificate
from recover.search import Solution

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class SearchRecord:
    """The solver's own account of one example."""

    status: str
    steps: int
    score: Number
    slack: Number


@dataclass(frozen=True)
class ExampleRecord:
    """One example: accounting for all, search and certificate for valid flips.

    Attributes:
        base_slack, defended_slack: in logits; the behavior shows where positive.
        certificate: the fields of `Certificate`, numbers or lists of numbers; None where nothing was searched.
        text: the prompt, only where it was asked for.
    """

    id: str
    base_slack: Number
    defended_slack: Number
    search: SearchRecord | None = None
    certificate: dict[str, Any] | None = None
    text: str | None = None

    @property
    def shows_at_base(self) -> bool:
        return self.base_slack > 0

    @property
    def shows_when_defended(self) -> bool:
        return self.defended_slack > 0

    @property
    def valid_flip(self) -> bool:
        """The behavior shows at base and not when defended."""
        return self.shows_at_base and not self.shows_when_defended

    def to_json(self) -> str:
        """One line of `examples.jsonl`."""
        values = {name: value for name, value in asdict(self).items() if name != "text" or value is not None}
        return json.dumps(without_nan(values | {"valid_flip": self.valid_flip}), allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> ExampleRecord:
        """Read one line of `examples.jsonl`.

        Raises:
            ValueError: it is not such a line.
        """
        values = json.loads(line)
        if not isinstance(values, dict) or not isinstance(values.pop("valid_flip", None), bool):
            raise ValueError("not the record of an example")
        record = _RECORD.validate_python(values)
        if record.certificate is not None and record.certificate.keys() != _MEASURED:
            raise ValueError("not the certificate of this version")
        return record


_RECORD = TypeAdapter(ExampleRecord)
_MEASURED = {field.name for field in fields(Certificate)}


def search_records(solution: Solution) -> list[SearchRecord]:
    """One record an example of a batch."""
    rows = zip(solution.status, solution.steps.tolist(), solution.score.tolist(), solution.slack.tolist(), strict=True)
    return [SearchRecord(status.name, steps, score, slack) for status, steps, score, slack in rows]


def certificate_records(certificate: Certificate) -> list[dict[str, Any]]:
    """One plain dictionary an example of a batch."""
    columns = {name: values.tolist() for name, values in vars(certificate).items()}
    return [
        without_nan({name: values[row] for name, values in columns.items()}) for row in range(len(certificate.shows))
    ]


def without_nan(value: Any) -> Any:
    """Plain values, with None for every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list | tuple) else value
