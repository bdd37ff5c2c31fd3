"""The suite enforces annotations: a wrong shape is refused in every test."""

import pytest
import torch
from jaxtyping import TypeCheckError

from counterflow.kernels.norm import rms_norm
from tests.typecheck import CALLS


@pytest.mark.parametrize("time", ["first", "second"])
def test_a_wrong_shape_is_refused_in_each_test_anew(time):
    with pytest.raises(TypeCheckError):
        rms_norm(torch.ones(2, 3), torch.ones(3, 3), 1e-6)
    for _ in range(2 * CALLS):
        rms_norm(torch.ones(2, 3), torch.ones(3), 1e-6)
    rms_norm(torch.ones(2, 3), torch.ones(2, 3), 1e-6)  # wrong, and no longer looked at
