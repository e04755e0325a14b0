"""The settings of the service. The only reader of EVERSTEP_* in this package.

Object storage takes the standard AWS_* variables, read by boto3 itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.errors import StartError

PREFIX = "EVERSTEP_"
SECRET = re.compile("([0-9a-fA-F]{2}){32,}")
TOKEN_CHARACTERS = 16
HIDDEN = ("admin_token", "secret")


class Settings(BaseSettings):
    """Where the service keeps, listens and reaches. Every field is EVERSTEP_<NAME>.

    Raises:
        StartError: naming each that can't be used, its value unless it is a secret, and its bound.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="ignore")

    state: Path = Field(Path(".everstep"), description="folder of all state")
    standalone: bool = Field(False, description="start Ray and SeaweedFS beside the service")
    listen: str = Field("127.0.0.1:0", description="address of the gRPC server; port 0: any free")
    published: str | None = Field(
        None, description="address at which others find `listen`, where a container publishes it"
    )
    tls: Path | None = Field(None, description="folder of server.crt and server.key; see tls.py")
    plaintext: bool = Field(
        False, description="serve beyond this machine without TLS: the network itself encrypts"
    )
    metrics_listen: str = Field("127.0.0.1:0", description="address of /metrics")
    storage: str | None = Field(None, description="s3://bucket/prefix or file:/folder of all jobs")
    ray_address: str | None = Field(None, description="address of Ray's GCS")
    admin_token: SecretStr | None = Field(
        None, min_length=TOKEN_CHARACTERS, description="bearer token that may do everything"
    )
    secret: SecretStr | None = Field(None, description="32 bytes in hex; attempts' credentials")
    advertise: str | None = Field(None, description="address at which workers reach the service")
    cache: Path | None = Field(None, description="folder of caches on the workers")
    data_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (),
        description="folders, divided by ':', that file: URIs must lie in; none: any folder, which "
        "is refused where others reach `listen`",
    )
    suspend_on_stop: bool = Field(
        False, description="checkpoint what runs before stopping: Ray goes down with the service"
    )
    stall_floor_s: float = Field(
        300.0, gt=0, description="a step is never late before; then at 20 times the median step"
    )
    stop_grace_s: float = Field(
        120.0, gt=0, le=120, description="without a word after a pause or cancel, then by force"
    )

    ray_cpus: int | None = Field(None, ge=1, description="CPUs of the embedded Ray; default: all")
    ray_gpus: int | None = Field(
        None, ge=0, description="GPUs of the embedded Ray; more than there are train on the CPU"
    )

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            raise StartError("; ".join(map(_described, error.errors()))) from None

    @field_validator("secret")
    @classmethod
    def _long_enough(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not SECRET.fullmatch(value.get_secret_value()):
            raise ValueError("must be 32 bytes in hex, as `openssl rand -hex 32` makes them")
        return value

    @field_validator("data_roots", mode="before")
    @classmethod
    def _divided(cls, value: object) -> object:
        return value.split(":") if isinstance(value, str) else value


def _described(error: Any) -> str:
    name = str(error["loc"][0])
    value = "" if name in HIDDEN else f" {error['input']!r}:"
    return f"{PREFIX}{name.upper()}:{value} {error['msg'].removeprefix('Value error, ')}"
