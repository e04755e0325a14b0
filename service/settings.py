"""The settings of the service. The only reader of EVERSTEP_* in this package.

Object storage takes the standard AWS_* variables, read by boto3 itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Where the service keeps, listens and reaches. Every field is EVERSTEP_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="EVERSTEP_", env_ignore_empty=True, extra="ignore")

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
    admin_token: SecretStr | None = Field(None, description="bearer token that may do everything")
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

    @field_validator("data_roots", mode="before")
    @classmethod
    def _divided(cls, value: object) -> object:
        return value.split(":") if isinstance(value, str) else value
