"""A tokenizer as files: ours (tokenizer.json and ranks.tiktoken) and nanochat's tokenizer.pkl.

Reads and writes without torch or tiktoken; encoding text is `trainer.data.tokenizer`'s business.

Invariant: no pickle executes: the one class admitted is a stand-in for tiktoken's Encoding, and
only with a plain dict as its state. The digest is of the content, so both formats of one
tokenizer have the same.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
from dataclasses import dataclass
from typing import Any

from trainer.storage.documents import sha256_hex
from trainer.storage.object_store import NotFoundError, ObjectStore

FORMAT_VERSION = 1
BOS = "<|bos|>"
DESCRIPTION = "tokenizer.json"
RANKS = "ranks.tiktoken"
PICKLE = "tokenizer.pkl"
MAX_FILE_BYTES = 256 << 20  # a tokenizer of a million tokens is a tenth of this


class TokenizerError(ValueError):
    """Not the files of a usable tokenizer, or text that it can't encode."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A byte-pair tokenizer: split pattern, bytes -> rank, special tokens -> id."""

    pattern: str
    ranks: dict[bytes, int]
    special_tokens: dict[str, int]

    def __post_init__(self) -> None:
        ids = sorted([*self.ranks.values(), *self.special_tokens.values()])
        if not ids or ids != list(range(len(ids))):
            raise TokenizerError("token ids must be 0, 1, 2, ... without gap or repetition")
        if any(bytes([value]) not in self.ranks for value in range(256)):
            raise TokenizerError("the ranks must hold every single byte")
        if BOS not in self.special_tokens:
            raise TokenizerError(f"there is no {BOS} among the special tokens")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.ranks) + len(self.special_tokens)

    @property
    def sha256(self) -> str:
        """Identity of the content, whatever the format it lies in."""
        return sha256_hex(self.description() + self.rank_lines())

    def description(self) -> bytes:
        """The bytes of tokenizer.json."""
        fields = {
            "format_version": FORMAT_VERSION,
            "pattern": self.pattern,
            "special_tokens": self.special_tokens,
            "vocab_size": self.vocab_size,
        }
        return json.dumps(fields, sort_keys=True, indent=1).encode() + b"\n"

    def rank_lines(self) -> bytes:
        """The bytes of ranks.tiktoken: base64 of the token, its rank, a line each."""
        by_rank = sorted(self.ranks.items(), key=lambda item: item[1])
        return b"".join(
            base64.b64encode(token) + b" " + str(rank).encode() + b"\n" for token, rank in by_rank
        )


def read_tokenizer_files(store: ObjectStore, prefix: str = "") -> tuple[str, TokenizerFiles]:
    """The format ('everstep' or 'nanochat') and content of the tokenizer in a folder.

    Raises:
        NotFoundError: the folder holds neither format's files.
        TokenizerError: they are there and can't be used.
    """
    form, content = read_content(store, prefix)
    return form, parse(form, content)


def read_content(store: ObjectStore, prefix: str = "") -> tuple[str, tuple[bytes, ...]]:
    """The same as bytes, not parsed: of each file of the format."""
    description = _read(store, prefix + DESCRIPTION)
    if description is not None:
        ranks = _read(store, prefix + RANKS)
        if ranks is None:
            raise TokenizerError(f"{DESCRIPTION} is there, {RANKS} is not")
        return "everstep", (description, ranks)
    pickled = _read(store, prefix + PICKLE)
    if pickled is None:
        raise NotFoundError(f"{store.uri}: neither {DESCRIPTION} nor nanochat's {PICKLE} is there")
    return "nanochat", (pickled,)


def parse(form: str, content: tuple[bytes, ...]) -> TokenizerFiles:
    """What read_content found; TokenizerError. A tenth of a second for a large vocabulary."""
    return (parse_everstep if form == "everstep" else parse_nanochat)(*content)


def write_tokenizer_files(files: TokenizerFiles, store: ObjectStore, prefix: str = "") -> None:
    """Write our format; the description last, so that a crash leaves no half tokenizer."""
    store.put(prefix + RANKS, files.rank_lines())
    store.put(prefix + DESCRIPTION, files.description())


def parse_everstep(description: bytes, rank_lines: bytes) -> TokenizerFiles:
    """Our own format from the bytes of its two files."""
    try:
        fields = json.loads(description)
    except ValueError as error:
        raise TokenizerError(f"{DESCRIPTION} is not JSON") from error
    if not isinstance(fields, dict) or fields.get("format_version") != FORMAT_VERSION:
        raise TokenizerError(f"{DESCRIPTION} is not of Everstep's format {FORMAT_VERSION}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(rank_lines.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{RANKS} line {number} is not 'base64 rank'") from error
    files = checked(fields.get("pattern"), ranks, fields.get("special_tokens"))
    if files.vocab_size != fields.get("vocab_size"):
        raise TokenizerError(
            f"{RANKS} and {DESCRIPTION} give {files.vocab_size} tokens, not the "
            f"{fields.get('vocab_size')} that {DESCRIPTION} says"
        )
    return files


def parse_nanochat(pickled: bytes) -> TokenizerFiles:
    """nanochat's format: a pickled tiktoken Encoding, read without running anything of it."""
    try:
        found = _Unpickler(io.BytesIO(pickled)).load()
    except TokenizerError:
        raise
    except Exception as error:  # a hostile or torn pickle can fail in any way
        raise TokenizerError(f"{PICKLE} can't be read ({type(error).__name__})") from error
    if not isinstance(found, _Encoding) or not isinstance(found.state, dict):
        raise TokenizerError(f"{PICKLE} does not hold a tiktoken Encoding")
    state = found.state
    return checked(state.get("pat_str"), state.get("mergeable_ranks"), state.get("special_tokens"))


def checked(pattern: Any, ranks: Any, special_tokens: Any) -> TokenizerFiles:
    """Check the types of what came from outside."""
    if not isinstance(pattern, str):
        raise TokenizerError("the split pattern is missing")
    for what, table, kind in (("ranks", ranks, bytes), ("special tokens", special_tokens, str)):
        if not isinstance(table, dict) or not all(
            isinstance(key, kind) and type(value) is int for key, value in table.items()
        ):
            raise TokenizerError(f"the {what} are not a table of {kind.__name__} to whole number")
    return TokenizerFiles(pattern, ranks, special_tokens)


class _Encoding:
    """Stands in for tiktoken.core.Encoding while unpickling."""

    state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> type:
        if (module_name, global_name) == ("tiktoken.core", "Encoding"):
            return _Encoding
        raise TokenizerError(
            f"{PICKLE} asks for {module_name}.{global_name}; only tiktoken's Encoding is admitted"
        )


def _read(store: ObjectStore, key: str) -> bytes | None:
    info = store.head(key)
    if info is None:
        return None
    if info.size_bytes > MAX_FILE_BYTES:
        raise TokenizerError(f"{key} is larger than any tokenizer ({info.size_bytes} bytes)")
    return store.get(key)
