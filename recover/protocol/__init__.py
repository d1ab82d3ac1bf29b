"""The protocol of a check, from a defense and prompts to a verdict.

Read `checking` first: `check` runs everything else here. `plan` says what is run, `runtime` how. `bench` holds the
model, the defense and the examples in batches. `phases` go example by example, `global_controls` and `heldout` over
all of them. `ledger` keeps finished work, `folder` keeps it on disk, and `workers` share it. `records`, `gates`,
`verdict` and `reasons` turn it into an answer, whose parts `verdict_model` names and describes.
"""

from recover.protocol.bench import Batch, Bench
from recover.protocol.checking import check
from recover.protocol.folder import RunFolder, RunState, write_whole
from recover.protocol.knowledge_model import Knowledge
from recover.protocol.ledger import InMemoryStore, Store
from recover.protocol.phases import BY_GRADIENT, PHASES, read_replies
from recover.protocol.plan import Plan, TransferPlan
from recover.protocol.readout import ReadOut, certificate_of, flips_of, read_out, read_out_suffix, search_pinned
from recover.protocol.records import CertificateRecord, ExampleRecord, SmallestRecord, certificate_values
from recover.protocol.runtime import Runtime
from recover.protocol.steps import run_phases, run_transfer
from recover.protocol.verdict import certified_norm, curve, placebo_pairs
from recover.protocol.verdict_model import Gate, OtherSchemaError, Recovery, RefusedTransfer, Transfer, Verdict
from recover.protocol.workers import ALONE, LostWorkerError, Workers, joined

__all__ = [
    "ALONE",
    "BY_GRADIENT",
    "PHASES",
    "Batch",
    "Bench",
    "CertificateRecord",
    "ExampleRecord",
    "Gate",
    "InMemoryStore",
    "Knowledge",
    "LostWorkerError",
    "OtherSchemaError",
    "Plan",
    "ReadOut",
    "Recovery",
    "RefusedTransfer",
    "RunFolder",
    "RunState",
    "Runtime",
    "SmallestRecord",
    "Store",
    "Transfer",
    "TransferPlan",
    "Verdict",
    "Workers",
    "certificate_of",
    "certificate_values",
    "certified_norm",
    "check",
    "curve",
    "flips_of",
    "joined",
    "placebo_pairs",
    "read_out",
    "read_out_suffix",
    "read_replies",
    "run_phases",
    "run_transfer",
    "search_pinned",
    "write_whole",
]
