from collections.abc import Iterator
from pathlib import Path

import pytest
from beside import Wait, begun


@pytest.fixture(scope="session", autouse=True)
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Wait]:
    with begun(request.session.items, Path(__file__).parent, tmp_path_factory) as wait:
        yield wait
