"""S3 and what speaks its protocol: the only module that knows boto3.

Endpoint, region and keys are boto3's business (standard AWS_* variables); none of them is ever
put into an error. Knows nothing of what the objects mean.

Invariant: every call ends within seconds when the store can't be reached (bounded timeouts and
attempts), and every foreign error leaves as a StoreError.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
)
from botocore.exceptions import (
    ConnectionError as EndpointError,
)

from trainer.storage.object_store import (
    CHUNK_BYTES,
    AlreadyExistsError,
    NotFoundError,
    ObjectInfo,
    Progress,
    StoreError,
    StoreKeyError,
    StoreRefusedError,
    StoreUnavailableError,
    check_key,
    local_errors,
    slice_bounds,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 16 << 20  # assumption: large enough for throughput, small enough to retry
UPLOAD_THREADS = 4
CONFLICT_TRIES = 5  # AWS answers 409 to one of two conditional puts in flight and asks to repeat

ABSENT = {"404", "NoSuchKey", "NotFound"}
LOST = {"412", "PreconditionFailed"}
NO_ANSWER = (EndpointError, HTTPClientError, ResponseStreamingError, IncompleteReadError)
BUSY = {"429", "SlowDown", "Throttling", "RequestTimeout", "RequestTimeTooSkewed", "InternalError"}


@dataclass(frozen=True)
class Patience:
    """How long a call may take when nothing answers: about attempts x timeout."""

    connect_s: float = 3.0
    read_s: float = 10.0
    attempts: int = 3


class S3ObjectStore:
    """A prefix in a bucket. boto3's client is safe to use from several threads."""

    def __init__(self, bucket: str, prefix: str = "", patience: Patience | None = None) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        with self._errors("client"):
            self._client = make_client(patience or Patience())
        self._transfer = TransferConfig(
            multipart_threshold=PART_BYTES,
            multipart_chunksize=PART_BYTES,
            max_concurrency=UPLOAD_THREADS,
        )

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def put(self, key: str, data: bytes, if_none_match: bool = False) -> None:
        name = self._name(key)
        if not if_none_match:
            with self._errors(key):
                self._client.put_object(Bucket=self._bucket, Key=name, Body=data)
            return
        for _ in range(CONFLICT_TRIES):
            with self._errors(key), contextlib.suppress(ConflictError):
                self._put_if_absent(name, data)
                return
        raise StoreUnavailableError(f"{self.uri}/{key}: other writers are in the way")

    def _put_if_absent(self, name: str, data: bytes) -> None:
        try:
            self._client.put_object(Bucket=self._bucket, Key=name, Body=data, IfNoneMatch="*")
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "ConditionalRequestConflict":
                raise ConflictError from error
            raise

    def put_file(self, key: str, path: Path, progress: Progress | None = None) -> None:
        with local_errors(str(path)):
            path.stat()
        with self._errors(key):
            self._client.upload_file(
                str(path), self._bucket, self._name(key), Callback=progress, Config=self._transfer
            )

    def get(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        begin, stop = slice_bounds(start, end)
        if stop is not None and stop <= begin:
            return b""
        with self._errors(key):
            if begin == 0 and stop is None:
                answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key))
                return answer["Body"].read()
            asked = f"bytes={begin}-{'' if stop is None else stop - 1}"
            try:
                answer = self._client.get_object(
                    Bucket=self._bucket, Key=self._name(key), Range=asked
                )
            except ClientError as error:
                if status_of(error) == 416:  # past the end, where a slice is empty
                    return b""
                raise
            return answer["Body"].read()

    def stream(self, key: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
        with self._errors(key):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._name(key))
            with contextlib.closing(answer["Body"]) as body:
                yield from body.iter_chunks(chunk_bytes)

    def get_file(self, key: str, path: Path) -> None:
        with local_errors(str(path)):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._errors(key):
            self._client.download_file(
                self._bucket, self._name(key), str(path), Config=self._transfer
            )

    def head(self, key: str) -> ObjectInfo | None:
        try:
            with self._errors(key):
                answer = self._client.head_object(Bucket=self._bucket, Key=self._name(key))
        except NotFoundError:
            return None
        return ObjectInfo(key, answer["ContentLength"], utc(answer["LastModified"]))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        pages = self._client.get_paginator("list_objects_v2")
        with self._errors(prefix):
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix + prefix):
                for item in page.get("Contents", ()):
                    key = item["Key"].removeprefix(self._prefix)
                    if key and not key.endswith("/"):  # folder markers that consoles make
                        yield ObjectInfo(key, item["Size"], utc(item["LastModified"]))

    def delete(self, key: str) -> None:
        with contextlib.suppress(NotFoundError), self._errors(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def _name(self, key: str) -> str:
        return self._prefix + check_key(key)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Translate boto3's errors. Only error codes are passed on: messages may hold keys."""
        where = f"{self.uri}/{key}"
        try:
            yield
        except S3UploadFailedError as error:
            raise translate(where, self._bucket, error.__context__ or error) from error
        except (ClientError, BotoCoreError) as error:
            raise translate(where, self._bucket, error) from error
        except OSError as error:  # the local side of a transfer
            raise StoreUnavailableError(f"{where}: {type(error).__name__}") from error


class ConflictError(Exception):
    """Two conditional puts were in flight; neither answer is known yet."""


def make_client(patience: Patience) -> S3Client:
    """A client of its own session: the shared default session is not safe to use from threads."""
    return boto3.session.Session().client(
        "s3",
        config=Config(
            connect_timeout=patience.connect_s,
            read_timeout=patience.read_s,
            retries={"mode": "standard", "total_max_attempts": patience.attempts},
            max_pool_connections=4 * UPLOAD_THREADS,
            # One host name serves every bucket: what S3-compatible servers expect.
            s3={"addressing_style": "path"},
            # Digests are ours, in the manifest; some servers refuse the newer checksum headers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def utc(moment: datetime) -> datetime:
    """A time of boto3's (in the local zone) in UTC."""
    return moment.astimezone(UTC)


def status_of(error: ClientError) -> int:
    """The HTTP status of an answer."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def translate(where: str, bucket: str, error: BaseException) -> StoreError:
    """What the caller can do about a foreign error."""
    if isinstance(error, ClientError):
        code = str(error.response.get("Error", {}).get("Code", "?"))
        status = status_of(error)
        if code == "NoSuchBucket":
            return StoreRefusedError(f"bucket {bucket!r} does not exist: make it first")
        if code in LOST:
            return AlreadyExistsError(f"{where} exists")
        if code in ABSENT:
            return NotFoundError(f"{where} does not exist")
        if code in BUSY or (status >= 500 and status != 501):
            return StoreUnavailableError(f"{where}: the store answered {status} {code}")
        if status == 403:
            kind = StoreKeyError if code == "SignatureDoesNotMatch" else StoreRefusedError
            return kind(
                f"{where}: access denied ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY "
                "and the rights they give on the bucket"
            )
        return StoreRefusedError(f"{where}: the store answered {status} {code}")
    if isinstance(error, NO_ANSWER):
        return StoreUnavailableError(
            f"{where}: no answer ({type(error).__name__}); check AWS_ENDPOINT_URL_S3 and the server"
        )
    return StoreRefusedError(
        f"{where}: {type(error).__name__}; check the AWS_* variables (keys, region, endpoint)"
    )
