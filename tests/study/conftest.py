"""What the tests of pages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .browser import Browser, binary


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if binary() is None:
        pytest.skip("no Chromium is installed (apt-get install chromium)")
    made = Browser()
    yield made
    made.close()
