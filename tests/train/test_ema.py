"""Averaged weights: the formula, in fp32, started from the weights, and resumed bit for bit."""

import pytest
import torch

from counterflow.train.ema import Ema


def weights(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in SHAPES.items()}


SHAPES = {"up": (3, 4), "norm": (5,), "nothing": (0, 2)}


def move(tensors: dict[str, torch.Tensor], step: int) -> None:
    for tensor in tensors.values():
        tensor.add_(0.125 * step)  # exact in bf16 too, so that every device rounds alike


def test_section_3_2_3_average_follows_the_weights_from_where_they_start():
    moving, decay = weights(), 0.9
    ema = Ema(moving, decay)
    expected = {name: tensor.clone() for name, tensor in moving.items()}
    assert all(torch.equal(ema.averages[name], tensor) for name, tensor in expected.items())
    for step in range(1, 6):
        move(moving, step)
        ema.update()
        for name, tensor in moving.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor
            torch.testing.assert_close(ema.averages[name], expected[name])


def test_averages_share_no_memory_with_weights():
    moving = weights()
    ema = Ema(moving, 0.5)
    before = ema.averages["up"].clone()
    move(moving, 1)
    assert torch.equal(ema.averages["up"], before)
    ema.update()
    kept = moving["up"].clone()
    ema.averages["up"].zero_()
    assert torch.equal(moving["up"], kept)


def test_bf16_weights_are_averaged_in_fp32():
    """A step of 1 - decay = 1e-4 is lost in bf16, whose neighbours of 1 are 4e-3 and 8e-3 away."""
    one = {"w": torch.ones(3, dtype=torch.bfloat16)}
    ema = Ema(one, 0.9999)
    one["w"].fill_(2.0)
    ema.update()
    assert ema.averages["w"].dtype == torch.float32
    torch.testing.assert_close(ema.averages["w"], torch.full((3,), 1.0001))


def test_averages_filled_in_place_go_on_bit_for_bit():
    moving = weights()
    whole = Ema(moving, 0.99)
    move(moving, 1)
    whole.update()
    resumed = Ema(moving, 0.99)
    for name, average in resumed.averages.items():
        average.copy_(whole.averages[name])
    for step in (2, 3):
        move(moving, step)
        whole.update()
        resumed.update()
    assert all(torch.equal(resumed.averages[name], average) for name, average in whole.averages.items())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_a_gpu_give_the_averages_of_the_same_on_the_cpu(dtype):
    """Written right before the update, so that a copy which is not waited for shows."""
    here, there = weights(dtype), weights(dtype, "cuda")
    here["large"], there["large"] = (
        torch.zeros(1 << 24, dtype=dtype),
        torch.zeros(1 << 24, dtype=dtype, device="cuda"),
    )
    on_cpu, on_gpu = Ema(here, 0.9), Ema(there, 0.9)
    for step in range(1, 4):
        move(here, step)
        move(there, step)
        on_cpu.update()
        on_gpu.update()
        for name, average in on_gpu.averages.items():
            assert average.device.type == "cpu"
            assert torch.equal(average, on_cpu.averages[name]), name
