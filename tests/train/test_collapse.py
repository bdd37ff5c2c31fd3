"""Words on collapsed routing: one line an event."""

import pytest

from counterflow.train.collapse import Collapses

pytestmark = pytest.mark.pure


def load(*dead: int) -> dict[str, list[int]]:
    """Of layers with so many of eight experts without a token."""
    return {f"layers.{index}": [0] * some + [4] * (8 - some) for index, some in enumerate(dead)}


def test_an_event_is_one_line_said_again_only_when_it_is_worse_or_over():
    known = Collapses()
    assert not known.line(1, load(8, 8), warming=True)
    assert not known.line(2, load(4, 4), warming=False), "half is not more than half"
    line = known.line(3, load(5, 0, 7), warming=False)
    assert (
        "step 3: routing has collapsed in layers.0, layers.2: 7 of 8 experts got no token in layers.2" in line
    )
    assert not known.line(4, load(5, 5, 8), warming=False), "three layers are not twice two"
    assert not known.line(5, load(3, 0, 0), warming=False), "not yet over"
    assert not known.line(6, load(5, 5, 0), warming=False), "nor anew"
    assert "layers.0, layers.1, layers.2 and 2 more: 6 of 8" in known.line(
        7, load(5, 5, 5, 6, 5), warming=False
    )
    assert "step 8: routing has recovered" in known.line(8, load(2, 2, 2, 0, 0), warming=False)
    assert not known.line(9, load(2), warming=False)
    assert "collapsed in layers.0:" in known.line(10, load(5), warming=False)


def test_a_model_without_experts_says_nothing():
    assert not Collapses().line(1, {}, warming=False)
