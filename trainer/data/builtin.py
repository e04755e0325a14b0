"""The builtin corpus: CPython's own documentation, as it lies on every machine that runs us.

Topics of the language reference, docstrings, and block comments of the standard library, read from
its sources without importing them (PSF licence). Small, but honest text: enough to see a loss fall
without a download. `python -m trainer.data.builtin --out URI --vocab-size N` prepares it.

Invariant: the folder's name is a digest of its content, and its marker is written last; so running
twice, or twice at once, ends with the same objects, and a half prepared folder is not used.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import json
import sys
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trainer.data.shards import TEXT_COLUMN
from trainer.data.tokenizer import train_tokenizer
from trainer.storage.object_store import ObjectStore, open_store
from trainer.storage.tokenizer_files import DESCRIPTION, write_tokenizer_files

NAME = "python-docs"
FORMAT = "1"  # part of the digest: changes when the same Python would give other shards
TRAINING_SHARDS = 8
ROW_GROUPS = 2  # of each shard; few, since packing loses most at a row group's end
MARKER = "corpus.json"
DEFAULT_VOCAB = 2048
MIN_DOCUMENT_CHARS = 40  # shorter ones say nothing
MIN_COMMENT_LINES = 3
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class CorpusUnavailableError(RuntimeError):
    """This Python comes without its sources: use another source of text."""


@dataclass(frozen=True)
class Prepared:
    """Where a prepared corpus lies, as a job spec names it."""

    source: str
    tokenizer: str


def prepare(out: str, vocab_size: int = DEFAULT_VOCAB) -> Prepared:
    """Write the corpus and a tokenizer below a store's address, unless they are there.

    Safe to repeat and to run several times at once. Takes seconds.
    """
    store = open_store(out)
    documents = collect()
    digest = corpus_digest(documents)
    folder = f"{NAME}-{digest[:16]}"
    shards = split(documents, TRAINING_SHARDS + 1)
    if store.head(f"{folder}/{MARKER}") is None:
        _write_corpus(store, folder, shards, digest)
    tokenizer = f"{folder}/tokenizer-{vocab_size}"
    if store.head(f"{tokenizer}/{DESCRIPTION}") is None:  # written last, so a marker in itself
        training = (text for shard in shards[:-1] for text in shard)
        write_tokenizer_files(train_tokenizer(training, vocab_size), store, f"{tokenizer}/")
    root = store.uri.rstrip("/")
    return Prepared(f"{root}/{folder}/data", f"{root}/{tokenizer}")


def collect() -> list[str]:
    """Every document once, in an order that is spread evenly and depends on the text alone."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [*_topics(), *_library(root)]
    distinct = {text for text in documents if len(text) >= MIN_DOCUMENT_CHARS}
    if len(distinct) < TRAINING_SHARDS * ROW_GROUPS * 8:
        raise CorpusUnavailableError(f"{root} holds no sources of the standard library")
    return sorted(distinct, key=lambda text: hashlib.blake2b(text.encode()).digest())


def corpus_digest(documents: Sequence[str]) -> str:
    """Digest of the shards' bytes, as far as they depend on more than the code here."""
    digest = hashlib.sha256(
        f"{FORMAT} {TRAINING_SHARDS} x {ROW_GROUPS}, pyarrow {pa.__version__}\n".encode()
    )
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def split(documents: Sequence[str], count: int) -> list[list[str]]:
    """Cut into count runs of about equally many characters."""
    total = sum(map(len, documents))
    runs: list[list[str]] = [[] for _ in range(count)]
    seen = 0
    for text in documents:
        runs[min(count - 1, seen * count // total)].append(text)
        seen += len(text)
    return runs


def parquet_bytes(documents: Sequence[str], row_groups: int) -> bytes:
    """One shard."""
    buffer = io.BytesIO()
    schema = pa.schema([pa.field(TEXT_COLUMN, pa.string())])
    with pq.ParquetWriter(buffer, schema, compression="zstd") as writer:
        for group in split(documents, row_groups):
            writer.write_table(pa.table({TEXT_COLUMN: group}, schema=schema))
    return buffer.getvalue()


def _write_corpus(
    store: ObjectStore, folder: str, shards: Sequence[Sequence[str]], digest: str
) -> None:
    for index, shard in enumerate(shards):
        store.put(f"{folder}/data/shard_{index:05d}.parquet", parquet_bytes(shard, ROW_GROUPS))
    about = {
        "name": NAME,
        "sha256": digest,
        "python": sys.version.split()[0],
        "licence": "PSF-2.0: documentation and sources of CPython's standard library",
        "documents": sum(map(len, shards)),
        "characters": sum(len(text) for shard in shards for text in shard),
    }
    store.put(f"{folder}/{MARKER}", json.dumps(about, sort_keys=True).encode() + b"\n")


def _topics() -> Iterator[str]:
    from pydoc_data.topics import topics  # half a megabyte, only for this

    for text in topics.values():
        yield text.strip()


def _library(root: Path) -> Iterator[str]:
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(place.parts):
            try:
                source = path.read_text("utf-8")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # old escapes in others' sources
                    tree = ast.parse(source)
            except (SyntaxError, ValueError):
                continue  # templates, and files of other encodings
            module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
            yield from _docstrings(module, tree)
            yield from _comments(source)


def _docstrings(module: str, tree: ast.Module) -> Iterator[str]:
    """The module's docstring, and a document for each of its classes and functions."""
    if text := ast.get_docstring(tree):
        yield f"{module}\n\n{text}"
    for definition in _definitions(tree.body):
        parts = [
            f"{name}\n\n{textwrap.indent(text, '    ')}"
            for name, text in _nested(definition, f"{module}.{definition.name}")
        ]
        if parts:
            yield "\n\n".join(parts)


def _nested(definition: Definition, name: str) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(definition):
        yield name, text
    for inner in _definitions(definition.body):
        yield from _nested(inner, f"{name}.{inner.name}")


def _definitions(body: Iterable[ast.stmt]) -> Iterator[Definition]:
    for statement in body:
        if isinstance(statement, Definition):
            yield statement
        elif isinstance(statement, ast.If | ast.Try):  # variants for other systems
            handlers = getattr(statement, "handlers", [])
            inner = [*statement.body, *statement.orelse, *(s for h in handlers for s in h.body)]
            yield from _definitions(inner)


def _comments(source: str) -> Iterator[str]:
    """Blocks of whole-line comments, as the prose that they mostly are."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        text = line.strip()
        if text.startswith("#"):
            block.append(text.lstrip("#").removeprefix(" ").rstrip())
            continue
        if len(block) >= MIN_COMMENT_LINES:
            yield "\n".join(block).strip()
        block = []


def main() -> None:
    """The command; prints one line of JSON for whoever starts a job with it."""
    parser = argparse.ArgumentParser(prog="python -m trainer.data.builtin", description=NAME)
    parser.add_argument("--out", required=True, help="file:/absolute/path or s3://bucket/prefix")
    parser.add_argument("--vocab-size", type=int, default=DEFAULT_VOCAB)
    arguments = parser.parse_args()
    print(json.dumps(asdict(prepare(arguments.out, arguments.vocab_size))))


if __name__ == "__main__":
    main()
