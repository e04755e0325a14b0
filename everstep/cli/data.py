"""`everstep data put`: text and tokenizer from a folder of this machine into the store.

Owns which files of a folder are meant. Knows nothing of how they travel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

from everstep.cli.options import data_folder, json_option
from everstep.cli.output import console, note, write_json
from everstep.client import Client
from everstep.nanochat_flags import TOKENIZER_FOLDER
from everstep.v1 import everstep_pb2 as pb

SHARDS = "*.parquet"
# Whichever of the two formats is there: nanochat's, or ours.
TOKENIZER_FORMATS = (("tokenizer.pkl",), ("tokenizer.json", "ranks.tiktoken"))


@dataclass(frozen=True)
class Found:
    """Files to bring; either may be absent, not both."""

    name: str
    shards: list[Path]
    tokenizer: list[Path]


@click.group()
def data() -> None:
    """Bring text and tokenizers into the service's store."""


@data.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--name", help="Name of the data.  [default: the folder's]")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder of the tokenizer.  [default: FOLDER, or FOLDER/tokenizer]",
)
@click.option("--overwrite", is_flag=True, help="Replace files whose content differs.")
@json_option
def put(
    folder: Path, name: str | None, tokenizer: Path | None, overwrite: bool, output: str
) -> None:
    """Store the parquet shards and the tokenizer of FOLDER, and print what a spec names.

    FOLDER may be nanochat's base folder. What is stored already isn't sent again, so a call that
    was interrupted is simply repeated.
    """
    found = find(folder, name, tokenizer)
    files = [*((path, found.name) for path in found.shards)]
    # The tokenizer's description last: a crash leaves no half tokenizer.
    files += [(path, f"{found.name}-tokenizer") for path in reversed(found.tokenizer)]
    uris: dict[str, str] = {}
    total = sum(path.stat().st_size for path, _ in files)
    with Client() as client, _progress(total) as bar:
        before = 0
        for path, target in files:
            uris[target] = client.put_file(
                path,
                target,
                overwrite=overwrite,
                progress=lambda stored, before=before: bar(before + stored),  # type: ignore[misc]
            )
            before += path.stat().st_size
    spec = pb.DataSpec(source=uris.get(found.name), tokenizer=uris.get(f"{found.name}-tokenizer"))
    if output == "json":
        write_json(spec)
    else:
        words = [f"{field.name}: {value}" for field, value in spec.ListFields()]
        click.echo(f"data: {{{', '.join(words)}}}")
    if len(found.shards) == 1:
        note("a job needs two shards: the last one validates")


def find(folder: Path, name: str | None = None, tokenizer: Path | None = None) -> Found:
    """What a folder holds: shards, or nanochat's base folder, and a tokenizer.

    Raises:
        click.UsageError: neither is there, or the name can't be one.
    """
    shards = sorted(folder.glob(SHARDS))
    text = folder
    if not shards and (folder / data_folder(folder)).is_dir():
        text = folder / data_folder(folder)
        shards = sorted(text.glob(SHARDS))
    places = [tokenizer] if tokenizer is not None else [folder, folder / TOKENIZER_FOLDER]
    tokens = next((files for place in places if (files := _tokenizer_files(place))), [])
    if tokenizer is not None and not tokens:
        raise click.UsageError(f"{tokenizer} holds no tokenizer: neither tokenizer.pkl nor ours")
    if not shards and not tokens:
        raise click.UsageError(f"{folder} holds no {SHARDS} and no tokenizer")
    name = name if name is not None else text.absolute().name
    if not re.fullmatch("[0-9A-Za-z][0-9A-Za-z._-]{0,53}", name):
        raise click.UsageError(
            f"--name {name!r}: 1 to 54 letters, digits, '.', '_' or '-', a letter or digit first"
        )
    return Found(name, shards, tokens)


def _tokenizer_files(folder: Path) -> list[Path]:
    for names in TOKENIZER_FORMATS:
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    return []


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, for people only; what it is given is the bytes done."""
    shown = console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=shown, disable=not shown.is_terminal) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda done: bar.update(task, completed=done)


COMMANDS = (data,)
