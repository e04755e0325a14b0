"""What commands have in common: -o json, and a spec from a file, a nanochat command line, --set.

Owns how these combine: the file or the command line first, --nanochat-dir for what it leaves out,
then --name and --from, then --set in order. Knows nothing of what is done with the spec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from everstep.nanochat_flags import DATA_FOLDERS, data_fields, translate
from everstep.spec_text import read_setting, read_spec
from everstep.specs import merged
from trainer.contract.spec import INT32_MAX

Command = TypeVar("Command", bound=Callable[..., Any])
NANOCHAT_CHECKPOINT = "nanochat:"
INT64_MAX = 2**63 - 1


@dataclass(frozen=True)
class Asked:
    """A spec, as far as it was given, and what to say about it."""

    spec: dict[str, Any]
    inherit: bool
    notes: list[str]


def whole(least: int = 0, most: int = INT32_MAX) -> click.IntRange:
    """A whole number that the wire can carry."""
    return click.IntRange(least, most)


def json_option(command: Command) -> Command:
    """-o json."""
    choice = click.Choice(["text", "json"])
    option = click.option(
        "-o", "--output", type=choice, default="text", show_default=True, help="Form of the output."
    )
    return option(command)


def spec_options(command: Command) -> Command:
    """SPEC and its options, as keywords for `asked`."""
    for decorate in (
        click.option(
            "--from",
            "start",
            metavar="JOB@STEP",
            help="Continue from a checkpoint; what isn't given is as in that job.",
        ),
        click.option("--nanochat", metavar="FLAGS", help="A nanochat command line, as it stands."),
        written_options,
    ):
        command = decorate(command)
    return command


def written_options(command: Command) -> Command:
    """SPEC and what changes it, without where it starts and what it is translated from."""
    folder = click.Path(file_okay=False, path_type=Path)
    for decorate in (
        click.option("--name", help="Name of the job."),
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="SECTION.FIELD=VALUE",
            help="Set one field; may be repeated.",
        ),
        click.option(
            "--nanochat-dir",
            type=folder,
            envvar="NANOCHAT_BASE_DIR",
            help="nanochat's base folder: data, tokenizer, checkpoints.",
        ),
        click.argument("spec", required=False, type=click.File("r", encoding="utf-8")),
    ):
        command = decorate(command)
    return command


def asked(
    *,
    spec: Any,
    nanochat: str | None,
    nanochat_dir: Path | None,
    start: str | None,
    settings: tuple[str, ...],
    name: str | None,
) -> Asked:
    """The spec that a command line asks for.

    Raises:
        SpecTextError, SpecError: it can't be read; click.UsageError: options that exclude another.
    """
    if spec is not None and nanochat is not None:
        raise click.UsageError("give a SPEC file or --nanochat, not both")
    changes: dict[str, Any] = {}
    for setting in settings:
        changes = merged(changes, read_setting(setting))
    base, notes = str(nanochat_dir.absolute()) if nanochat_dir is not None else None, []
    data: dict[str, Any] = {}
    if nanochat is not None:
        vocab_size = _get(changes, "model", "vocab_size")
        made = translate(nanochat, base, vocab_size if isinstance(vocab_size, int) else None)
        data, notes = made.spec, made.notes
    elif spec is not None:
        data = _read(spec)
    # A nanochat checkpoint has no spec of ours to inherit.
    inherit = start is not None and not start.startswith(NANOCHAT_CHECKPOINT)
    # A continuation keeps its parent's data, whatever the environment is set to for nanochat.
    source = click.get_current_context().get_parameter_source("nanochat_dir")
    if nanochat_dir is not None and not (inherit and source is ParameterSource.ENVIRONMENT):
        data = merged({"data": data_fields(str(base), data_folder(nanochat_dir))}, data)
    if name is not None:
        data = merged(data, {"name": name})
    if start is not None:
        if nanochat is not None and "start" in data:
            raise click.UsageError("give --from or --resume-from-step, not both")
        data = merged(data, {"start": {"from": start}})
    if inherit and nanochat is not None:
        notes = [
            *notes,
            "--nanochat: flags left out take nanochat's defaults, not that job's values",
        ]
    return Asked(merged(data, changes), inherit, notes)


def _read(file: Any) -> dict[str, Any]:
    try:
        text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{file.name} can't be read: {error}") from error
    return read_spec(text, file.name)


def data_folder(base: Path) -> str:
    """The newest of nanochat's data folders that is there, else the newest."""
    return next((name for name in DATA_FOLDERS if (base / name).is_dir()), DATA_FOLDERS[0])


def _get(data: dict[str, Any], section: str, field: str) -> Any:
    part = data.get(section)
    return part.get(field) if isinstance(part, dict) else None
