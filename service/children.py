"""Work that needs torch, done by a child process: the service has none.

A request is one line of JSON on its stdin, each line of its stdout an answer.

Invariant: the child ends with the request, whether it is read to its end, given up or refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Mapping
from typing import Any

LINE_BYTES = 1 << 20


async def answers(module: str, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """What the module says to a request, line by line; {"error": why} where it fails."""
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        module,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_BYTES,
        start_new_session=True,  # a Ctrl-C in our terminal is for us alone
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.close()
        async for line in child.stdout:
            yield json.loads(line)
        if await child.wait() != 0:
            yield {"error": f"the process ended with {child.returncode}; see the log"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
