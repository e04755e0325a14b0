"""The import rules: the linter's contracts, and who alone may know what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]

# Foreign package -> the only modules of ours that may import it.
ONLY = {
    "boto3": {"trainer.storage.s3"},
    "botocore": {"trainer.storage.s3"},
    "ray": {"service.ray_cluster", "trainer.ray_entrypoint"},
    "sqlalchemy": {"service.store", "service.store.migrations"},
    "alembic": {"service.store", "service.store.migrations"},
    "pydantic_settings": {"service.settings"},
    "prometheus_client": {"service.metrics", "service.metrics_page", "service.__main__"},
    "pynvml": {"trainer.gpu", "service.doctor"},
    "psutil": {"service.parts"},
    "pyarrow": {"trainer.data"},
    "tiktoken": {"trainer.data.tokenizer"},
    "rustbpe": {"trainer.data.tokenizer"},
    "safetensors": {"trainer.checkpoint"},
}
GRPC = {"everstep", "service", "trainer.report"}  # trainer: one module speaks to the service


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("everstep", "service", "trainer", include_external_packages=True)


def allowed(module: str, homes: set[str]) -> bool:
    return any(module == home or module.startswith(home + ".") for home in homes)


def test_contracts_hold() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("package", sorted(ONLY))
def test_foreign_package_is_known_in_one_place(graph: grimp.ImportGraph, package: str) -> None:
    users = graph.find_modules_that_directly_import(package)
    assert users, f"nobody imports {package}: drop it from the table and from pyproject.toml"
    assert [user for user in users if not allowed(user, ONLY[package])] == []


def test_one_module_of_the_trainer_speaks_grpc(graph: grimp.ImportGraph) -> None:
    users = graph.find_modules_that_directly_import("grpc")
    assert [user for user in users if not allowed(user, GRPC)] == []


def test_contract_imports_in_milliseconds_and_without_the_heavy_ones() -> None:
    code = (
        "import sys, trainer.contract.plan, trainer.contract.outcome, trainer.contract.credential;"
        "print([m for m in ('torch', 'ray', 'boto3', 'grpc', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_client_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, everstep, everstep.cli.__main__;"
        "print([m for m in ('torch', 'ray', 'boto3', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
