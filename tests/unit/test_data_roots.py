"""Which file: URIs a spec may name: those below the allowed roots, links followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.storage import Storage
from tests.fakes.corpus import CORPUS, TOKENIZER
from tests.fakes.memory_store import MemoryObjectStore
from trainer.contract.spec import DataSpec
from trainer.contract.violations import SpecError


async def refusals(data: DataSpec, *roots: Path) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        await Storage(MemoryObjectStore(), roots).bind(data)
    return {violation.field: violation.reason for violation in caught.value.violations}


async def test_data_below_a_root_is_bound_and_without_roots_any_is() -> None:
    data = DataSpec(source=f"file:{CORPUS}", tokenizer=f"file:{TOKENIZER}")
    for roots in ([], [CORPUS], [Path("/nowhere"), CORPUS.parent]):
        bound = await Storage(MemoryObjectStore(), roots).bind(data)
        assert len(bound.shards) == 3


@pytest.mark.parametrize(
    "path", ["/", "/etc", "{root}/../secret", "{root}-other", "{root}/link", "//{root}/../secret"]
)
async def test_whatever_leads_outside_is_refused_by_field(tmp_path: Path, path: str) -> None:
    root = tmp_path / "data"
    root.mkdir()
    for name in ("secret", "data-other"):
        (tmp_path / name).mkdir()
    (root / "link").symlink_to(tmp_path / "secret")
    uri = "file:" + path.format(root=root)
    found = await refusals(DataSpec(source=uri, tokenizer=uri), root)
    assert set(found) == {"data.source", "data.tokenizer"}
    assert found["data.source"] == f"must lie in {root} (EVERSTEP_DATA_ROOTS)"
