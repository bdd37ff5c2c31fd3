"""A few cases of every part of the campaign; `python -m bench.campaign` tries them by the thousand."""

import pytest

from bench.campaign.__main__ import campaign

pytestmark = pytest.mark.slow


CASES = {
    "layouts": (11, 2),
    "kills": (0, 2),
    "corruption": (0, 120),
    "commands": (0, 2),
    "requests": (0, 150),
    "http": (0, 40),
}
"""Of each part the first case and how many."""


@pytest.mark.parametrize("part", CASES)
def test_short_seeds(part):
    first, count = CASES[part]
    found = campaign(part, 0, count, first=first, shown=False)
    assert found["cases"] == count
    assert not found["failures"], "\n".join(one["what"] for one in found["failures"])
