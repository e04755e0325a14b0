"""An attempt's credential: worth something for one attempt of one job, at one service."""

import pytest

from trainer.contract.credential import (
    AttemptIdentity,
    BadCredentialError,
    attempt_credential,
    check_credential,
    host_key,
)

SECRET = bytes(range(32))
WHO = AttemptIdentity("01JOB", 2, 3)
TOKEN = attempt_credential(host_key(SECRET, "01JOB", 2), WHO)
PREFIX, JOB, HOST, ATTEMPT, MAC = TOKEN.split(".")


def test_a_credential_names_its_attempt() -> None:
    assert check_credential(SECRET, TOKEN) == WHO


def test_a_host_can_derive_credentials_for_its_own_attempts_only() -> None:
    key = host_key(SECRET, "01JOB", 2)
    later = AttemptIdentity("01JOB", 2, 9)
    assert check_credential(SECRET, attempt_credential(key, later)) == later
    for other in (AttemptIdentity("01JOB", 3, 3), AttemptIdentity("02JOB", 2, 3)):
        with pytest.raises(BadCredentialError):
            check_credential(SECRET, attempt_credential(key, other))


def test_another_services_credential_is_refused() -> None:
    with pytest.raises(BadCredentialError, match="not issued by this service"):
        check_credential(bytes(32), TOKEN)


@pytest.mark.parametrize(
    "token",
    [
        "",
        "evr1",
        f"evr2.{JOB}.{HOST}.{ATTEMPT}.{MAC}",
        f"{PREFIX}.OTHER.{HOST}.{ATTEMPT}.{MAC}",
        f"{PREFIX}.{JOB}.1.{ATTEMPT}.{MAC}",
        f"{PREFIX}.{JOB}.{HOST}.4.{MAC}",
        f"{PREFIX}.{JOB}.{HOST}.0{ATTEMPT}.{MAC}",
        f"{PREFIX}.{JOB}.-1.{ATTEMPT}.{MAC}",
        f"{PREFIX}.{JOB}.\u00b2.{ATTEMPT}.{MAC}",  # a digit to str.isdigit, not to int
        f"{PREFIX}.{JOB}.{'9' * 5000}.{ATTEMPT}.{MAC}",
        f"{PREFIX}.{JOB}.{HOST}.{ATTEMPT}.{MAC[:-1]}",
        f"{PREFIX}.{JOB}.{HOST}.{ATTEMPT}.{MAC[:-1]}\u00e9",
        f"{TOKEN}.more",
    ],
)
def test_a_malformed_or_forged_credential_is_refused(token: str) -> None:
    with pytest.raises(BadCredentialError):
        check_credential(SECRET, token)
