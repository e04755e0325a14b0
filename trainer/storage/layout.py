"""Where things lie in a bucket: pure functions between keys and what they name.

The only module that spells a key of the bucket; it never touches a store.

Invariant: parsing what a key function returns gives its arguments back, and any other key parses
to None, so foreign objects in a bucket are never taken for ours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_STEP = 10**10 - 1  # ten digits, so that the order of keys is the order of steps

_JOB = r"[0-9A-Za-z]{1,64}"
_PART = r"part-[0-9A-Za-z_-]{1,64}\.safetensors"
_SHARE = r"share-(\d{5})\.json"
_CLAIM_KEY = re.compile(rf"jobs/({_JOB})/attempts/([1-9]\d{{0,9}})\.json")
_TOO_LARGE_KEY = re.compile(
    rf"jobs/({_JOB})/attempts/([1-9]\d{{0,9}})\.out-of-memory-at-([1-9]\d{{0,9}})"
)
_CHECKPOINT_KEY = re.compile(
    rf"jobs/({_JOB})/checkpoints/(\d{{10}})/([1-9]\d{{0,9}})/(manifest\.json|{_PART}|{_SHARE})"
)
_HOLD_KEY = re.compile(rf"jobs/({_JOB})/checkpoints/(\d{{10}})/([1-9]\d{{0,9}})/held-by-({_JOB})")
_LOG_KEY = re.compile(rf"jobs/({_JOB})/logs/(0|[1-9]\d{{0,9}})/(\d{{5}})/(\d{{8,10}})\.jsonl")
_FOLDER = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,63}")
_SHARD = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}\.parquet")
TOKENIZER_FILES = ("tokenizer.pkl", "tokenizer.json", "ranks.tiktoken")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class ClaimKey:
    """What a claim's key says."""

    job_id: str
    attempt: int


@dataclass(frozen=True)
class CheckpointKey:
    """What the key of a checkpoint's file says; file: the manifest's name, a part's, a share's."""

    job_id: str
    step: int
    attempt: int
    file: str


@dataclass(frozen=True, order=True)
class LogKey:
    """What the key of a piece of log says; pieces of a rank count from 1.

    attempt 0: of ranks that ended before they belonged to one; their pieces count from the second
    since the epoch in which a rank began.
    """

    attempt: int
    rank: int
    sequence: int


def is_job_id(text: str) -> bool:
    """Whether a job could have this id."""
    return re.fullmatch(_JOB, text) is not None


def job_prefix(job_id: str) -> str:
    """Everything of a job."""
    assert is_job_id(job_id), f"not a job id: {job_id!r}"
    return f"jobs/{job_id}/"


def spec_key(job_id: str) -> str:
    """The job's document: spec, data binding, start."""
    return job_prefix(job_id) + "spec.json"


def retention_key(job_id: str) -> str:
    """Which checkpoints the job keeps, where that was changed after its submission."""
    return job_prefix(job_id) + "retention.json"


def claims_prefix(job_id: str) -> str:
    """All claims of a job."""
    return job_prefix(job_id) + "attempts/"


def claim_key(job_id: str, attempt: int) -> str:
    """The claim of an attempt; attempts count from 1."""
    assert attempt >= 1, attempt
    return f"{claims_prefix(job_id)}{attempt}.json"


def too_large_key(job_id: str, attempt: int, rows: int) -> str:
    """Says that an attempt ran out of memory with so many rows a micro-step."""
    assert attempt >= 1, attempt
    assert rows >= 1, rows
    return f"{claims_prefix(job_id)}{attempt}.out-of-memory-at-{rows}"


def parse_too_large(key: str) -> int | None:
    """The rows that a key of too_large_key says were too many, if it is one."""
    match = _TOO_LARGE_KEY.fullmatch(key)
    return int(match[3]) if match else None


def checkpoints_prefix(job_id: str) -> str:
    """All checkpoints of a job, committed or not."""
    return job_prefix(job_id) + "checkpoints/"


def checkpoint_prefix(job_id: str, step: int, attempt: int) -> str:
    """All files of one checkpoint."""
    assert 0 <= step <= MAX_STEP, step
    assert attempt >= 1, attempt
    return f"{checkpoints_prefix(job_id)}{step:010d}/{attempt}/"


def manifest_key(job_id: str, step: int, attempt: int) -> str:
    """The object whose existence makes a checkpoint exist."""
    return checkpoint_prefix(job_id, step, attempt) + MANIFEST


def part_key(job_id: str, step: int, attempt: int, name: str) -> str:
    """A part of a checkpoint."""
    assert is_part_name(name), f"not a part's name: {name!r}"
    return checkpoint_prefix(job_id, step, attempt) + name


def share_key(job_id: str, step: int, attempt: int, rank: int) -> str:
    """Says what a rank wrote of a checkpoint, to the rank that commits it."""
    return checkpoint_prefix(job_id, step, attempt) + share_name(rank)


def hold_key(job_id: str, step: int, attempt: int, by_job_id: str) -> str:
    """Says that another job starts from a checkpoint."""
    assert is_job_id(by_job_id), f"not a job id: {by_job_id!r}"
    return f"{checkpoint_prefix(job_id, step, attempt)}held-by-{by_job_id}"


def logs_prefix(job_id: str) -> str:
    """All logs of a job."""
    return job_prefix(job_id) + "logs/"


def log_key(job_id: str, key: LogKey) -> str:
    """One piece of one rank's log in one attempt."""
    return f"{logs_prefix(job_id)}{key.attempt}/{key.rank:05d}/{key.sequence:08d}.jsonl"


def parse_log(key: str) -> LogKey | None:
    """The piece of log that a key names, if it names one."""
    match = _LOG_KEY.fullmatch(key)
    return LogKey(int(match[2]), int(match[3]), int(match[4])) if match else None


def data_prefix(folder: str) -> str:
    """All files of a folder that users brought: shards, or a tokenizer."""
    assert _FOLDER.fullmatch(folder), f"not a data folder: {folder!r}"
    return f"data/{folder}/"


def data_key(folder: str, name: str) -> str:
    """One file of such a folder."""
    assert data_name_problem(folder, name) is None, (folder, name)
    return data_prefix(folder) + name


def data_name_problem(folder: str, name: str) -> str | None:
    """Why a file can't be kept under these names, as field, value and bound; None: it can."""
    if not _FOLDER.fullmatch(folder):
        return f"file.folder: {folder[:80]!r}: 1 to 64 letters, digits, '.', '_' or '-'"
    if name not in TOKENIZER_FILES and not _SHARD.fullmatch(name):
        return f"file.name: {name[:80]!r}: NAME.parquet or one of {', '.join(TOKENIZER_FILES)}"
    return None


def part_name(index: int, rank: int = 0) -> str:
    """The name of the index-th part that a rank writes."""
    return f"part-{rank:05d}-{index:05d}.safetensors"


def share_name(rank: int) -> str:
    """The name of the description of a rank's parts."""
    return f"share-{rank:05d}.json"


def parse_share(name: str) -> int | None:
    """The rank whose share a file's name names, if it names one."""
    match = re.fullmatch(_SHARE, name)
    return int(match[1]) if match else None


def is_part_name(name: str) -> bool:
    """Whether a file of this name can be a part."""
    return re.fullmatch(_PART, name) is not None


def parse_claim(key: str) -> ClaimKey | None:
    """The claim that a key names, if it names one."""
    match = _CLAIM_KEY.fullmatch(key)
    return ClaimKey(match[1], int(match[2])) if match else None


def parse_hold(key: str) -> CheckpointKey | None:
    """The checkpoint that a hold's key names; file is the job that holds it."""
    match = _HOLD_KEY.fullmatch(key)
    return CheckpointKey(match[1], int(match[2]), int(match[3]), match[4]) if match else None


def parse_checkpoint(key: str) -> CheckpointKey | None:
    """The checkpoint and file that a key names, if it names one."""
    match = _CHECKPOINT_KEY.fullmatch(key)
    return CheckpointKey(match[1], int(match[2]), int(match[3]), match[4]) if match else None
