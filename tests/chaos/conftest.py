"""What the chaos tests share."""

from __future__ import annotations

import pytest


@pytest.fixture
def chaos_full(request: pytest.FixtureRequest) -> bool:
    """Whether to do all the harm, or as much as a quick run can."""
    return bool(request.config.getoption("chaos_full"))
