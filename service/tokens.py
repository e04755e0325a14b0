"""Tokens made, listed and taken out of use; what the gate knows follows at once.

Knows no gRPC. The secret of a token is in the answer that made it and nowhere else.

Invariant: the keyring holds what the database says is in use, from before the first call on.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time

from ulid import ULID

from service.access import BOOTSTRAP, Identity, Keyring, Role, digest
from service.errors import PreconditionError, TokenNotFoundError, require
from service.store import Token, TokenStore

PREFIX = "evt1_"  # so that a secret that turns up somewhere is known for what it is
MOST_IN_USE = 1000  # each call compares with all of them
log = logging.getLogger(__name__)


class Tokens:
    """What admins can do with tokens."""

    def __init__(self, store: TokenStore, keyring: Keyring) -> None:
        self._store = store
        self._keyring = keyring
        self._turn = asyncio.Lock()  # what was read first must not be filled in last

    async def load(self) -> None:
        """Let in who holds a token in use, and nobody else."""
        in_use = [token for token in await self._store.all() if token.revoked_at is None]
        self._keyring.fill(
            (token.sha256, Identity(token.name, Role[token.role])) for token in in_use
        )

    async def create(self, name: str, role: Role, actor: str) -> tuple[Token, str]:
        """A new token and its secret.

        Raises:
            InvalidRequestError: not a name.
            PreconditionError: a token in use has the name, or there are too many.
        """
        fits = re.fullmatch("[0-9A-Za-z][0-9A-Za-z._-]{0,63}", name) is not None
        form = "1 to 64 letters, digits, '.', '_' or '-'"
        require(fits and name != BOOTSTRAP, f"name: {name[:80]!r}: {form}; not {BOOTSTRAP}")
        secret = PREFIX + secrets.token_urlsafe(32)
        token = Token(str(ULID()), name, role.name, digest(secret), time.time())
        async with self._turn:
            if sum(each.revoked_at is None for each in await self.all()) >= MOST_IN_USE:
                raise PreconditionError(f"{MOST_IN_USE} tokens are in use already: revoke some")
            if not await self._store.insert(token):
                raise PreconditionError(
                    f"a token in use is called {name}: revoke it, or choose a name"
                )
            await self.load()
        log.info("token %s of role %s made by %s", name, role.name.lower(), actor)
        return token, secret

    async def all(self) -> list[Token]:
        """Every token, oldest first, the revoked ones too."""
        return await self._store.all()

    async def revoke(self, name: str, actor: str) -> Token:
        """Take a token out of use, by name or id; TokenNotFoundError."""
        async with self._turn:
            token = await self._store.revoke(name, time.time())
            if token is None:
                raise TokenNotFoundError(f"no token in use is called {name[:80]!r}")
            await self.load()
        log.info("token %s revoked by %s", token.name, actor)
        return token
