"""`verdict.schema.json`, generated from the models of the verdict: `python -m recover.protocol.schema` writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recover.protocol.verdict_model import SCHEMA, Verdict

PATH = Path(__file__).with_name("verdict.schema.json")


def verdict_schema() -> dict[str, Any]:
    """The JSON Schema of `verdict.json`, with the unit and meaning of every figure."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA}
    return head | Verdict.model_json_schema() | {"title": "verdict.json of recover"}


if __name__ == "__main__":
    PATH.write_text(json.dumps(verdict_schema(), indent=1) + "\n", encoding="utf-8")
