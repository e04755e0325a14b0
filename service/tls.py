"""A gRPC port that others reach: its certificate, and what is refused before it listens.

A certificate is a folder with server.crt and server.key, and with ca.crt where server.crt doesn't
vouch for itself. It must bear every name that is used to reach the service: 127.0.0.1 for the
health check, the advertised address for workers, and what clients call it.

Invariant: tokens never cross a network in the clear unless somebody said that it encrypts, nor do
those who hold one from elsewhere name any folder of this machine unless somebody said so.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

import grpc

from service.errors import StartError
from service.settings import Settings

CERTIFICATE, KEY, AUTHORITY = "server.crt", "server.key", "ca.crt"
PEM_HEAD = b"-----BEGIN "


@dataclass(frozen=True)
class Certificate:
    """What the server shows, and what its clients trust (PEM)."""

    chain: bytes
    key: bytes
    authority: Path

    @classmethod
    def read(cls, folder: Path) -> Certificate:
        """Read a folder; StartError names the file that can't be used."""
        authority = folder / AUTHORITY
        if not authority.exists():
            authority = folder / CERTIFICATE
        pem = {}
        for path in (folder / CERTIFICATE, folder / KEY, authority):
            try:
                pem[path] = path.read_bytes()
            except OSError as error:
                raise StartError(f"EVERSTEP_TLS: {path} can't be read: {error.strerror}") from error
            if not pem[path].lstrip().startswith(PEM_HEAD):
                raise StartError(f"EVERSTEP_TLS: {path} is not a PEM file")
        return cls(pem[folder / CERTIFICATE], pem[folder / KEY], authority)

    def credentials(self) -> grpc.ServerCredentials:
        """For a server."""
        return grpc.ssl_server_credentials([(self.key, self.chain)])


def certificate(settings: Settings) -> Certificate | None:
    """The certificate to serve with; None: plaintext.

    Raises:
        StartError: it can't be read, or plaintext would leave this machine.
    """
    if settings.tls is not None:
        return Certificate.read(settings.tls)
    address = _address(settings)
    if not settings.plaintext and not is_loopback(address):
        raise StartError(
            f"{address} is not this machine alone, and tokens would be sent in the clear: give a "
            "certificate by EVERSTEP_TLS, or, where the network itself encrypts (WireGuard, "
            "Tailscale), set EVERSTEP_PLAINTEXT=yes"
        )
    return None


def require_data_roots(settings: Settings) -> None:
    """StartError where specs from other machines could name any folder of this one."""
    address = _address(settings)
    if not settings.data_roots and not is_loopback(address):
        raise StartError(
            f"{address} is not this machine alone, and specs could name any folder of it: give the "
            "folders that file: URIs may lie in by EVERSTEP_DATA_ROOTS, divided by ':' (/: any)"
        )


def _address(settings: Settings) -> str:
    """The host that others reach the service at."""
    return settings.published or settings.listen.rpartition(":")[0]


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.strip("[]")).is_loopback
    except ValueError:
        return False
