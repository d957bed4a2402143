"""What tests of the engine share."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.engine.bench import Bench


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A worker's surroundings, with a journal of its own."""
    made = Bench(tmp_path)
    yield made
    await made.journal.aclose()
