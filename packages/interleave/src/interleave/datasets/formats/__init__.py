"""The reference's file formats, to and from our records.

Readers take a `root` that no path in a file may lead out of, and put the pictures into a store; writers copy them
beside the file.  What survives both ways is everything a format holds but the names of its picture files, since a
picture is known by its pixels; what a format cannot hold, the function that writes it says.
Formats: InterleaveThinker, arXiv 2606.13679, and its code of June 2026.
"""

from interleave.datasets.formats.execution import read_execution_record, write_execution_record
from interleave.datasets.formats.sequences import write_interleaved
from interleave.datasets.formats.training import read_rl, read_sft, write_rl, write_sft
from interleave.datasets.formats.ueval import (
    UevalAnswer,
    read_ueval,
    read_ueval_record,
    ueval_answer,
    write_ueval,
    write_ueval_record,
)
from interleave.datasets.rows import Evaluation, RlRow, SftRow, Story, critic_rows, planner_row, rl_rows

__all__ = [
    "Evaluation",
    "RlRow",
    "SftRow",
    "Story",
    "UevalAnswer",
    "critic_rows",
    "planner_row",
    "read_execution_record",
    "read_rl",
    "read_sft",
    "read_ueval",
    "read_ueval_record",
    "rl_rows",
    "ueval_answer",
    "write_execution_record",
    "write_interleaved",
    "write_rl",
    "write_sft",
    "write_ueval",
    "write_ueval_record",
]
