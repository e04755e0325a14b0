"""The service imports trainer.storage: it must stay light."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "ray", "boto3", "botocore", "numpy", "pyarrow", "tiktoken", "grpc")
PROGRAM = f"""
import sys
from trainer.storage import (binding, layout, manifest, object_store, repository, retention,
                             tokenizer_files)
object_store.open_store("file:/tmp")
print([name for name in {HEAVY!r} if name in sys.modules])
"""


def test_storage_imports_nothing_heavy_until_a_bucket_is_opened() -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"
