"""To be described."""

from recover.protocol.bench import Batch, Bench
from recover.protocol.ledger import InMemoryStore
from recover.protocol.phases import read_replies
from recover.protocol.readout import ReadOut, certificate_of, flips_of, read_out, read_out_suffix, search_pinned
from recover.protocol.records import ExampleRecord, certificate_values
from recover.protocol.steps import run_phases, run_transfer
from recover.protocol.verdict import certified_norm, curve, placebo_pairs

__all__ = [
    "Batch",
    "Bench",
    "ExampleRecord",
    "InMemoryStore",
    "ReadOut",
    "certificate_of",
    "certificate_values",
    "certified_norm",
    "curve",
    "flips_of",
    "placebo_pairs",
    "read_out",
    "read_out_suffix",
    "read_replies",
    "run_phases",
    "run_transfer",
    "search_pinned",
]
