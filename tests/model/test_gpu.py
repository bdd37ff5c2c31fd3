"""On a GPU the model gives what it gives on the CPU: losses, counts, gradients, owed ones too."""

from dataclasses import replace

import pytest
import torch

from counterflow.kernels.grouped import add_grouped_product, grouped_matmul
from counterflow.model.debts import Ledger
from counterflow.model.transformer import Transformer
from tests.model.configs import BASE, random_model

pytestmark = pytest.mark.gpu

CONFIG = replace(
    BASE,
    hidden_size=64,
    q_lora_rank=32,
    kv_lora_rank=32,
    moe_intermediate_size=32,
    num_mtp_modules=2,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=16,
)


def gradients(model: Transformer, samples: torch.Tensor, owing: bool):
    for parameter in model.parameters():
        parameter.grad = None
        parameter.main_grad = torch.zeros(parameter.shape, device=parameter.device)
    ledger = Ledger(owing)
    losses = model(samples.to(model.head.device), mtp_weight=0.3, ledger=ledger)
    losses.total.backward()
    ledger.pay()
    return losses, {n: p.main_grad if p.dim() > 1 else p.grad.float() for n, p in model.named_parameters()}


@pytest.mark.parametrize("owing", [False, True])
def test_fp32_losses_counts_and_gradients_equal_the_cpus(owing):
    """Sums in another order and TF32 off: 1e-4 relative to the largest element."""
    samples = torch.randint(0, CONFIG.vocab_size, (3, 65), generator=torch.Generator().manual_seed(0))
    expected, want = gradients(random_model(CONFIG), samples, owing)
    losses, got = gradients(random_model(CONFIG).cuda(), samples, owing)
    assert torch.equal(losses.counts.cpu(), expected.counts)
    assert torch.allclose(losses.total.cpu(), expected.total, rtol=1e-5)
    for name, gradient in got.items():
        assert (gradient.cpu() - want[name]).abs().max() <= 1e-4 * want[name].abs().max(), name


def test_bf16_runs_through_grouped_mm_and_stays_near_fp32():
    """bf16 rounds every product to 8 bits and may route a token otherwise: the loss within 1 %."""
    samples = torch.randint(0, CONFIG.vocab_size, (3, 65), generator=torch.Generator().manual_seed(0))
    expected, _ = gradients(random_model(CONFIG), samples, owing=False)
    model = random_model(CONFIG).cuda()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    losses, got = gradients(model, samples, owing=True)
    assert torch.allclose(losses.total.cpu(), expected.total, rtol=1e-2)
    assert all(torch.isfinite(gradient).all() for gradient in got.values())


@pytest.mark.parametrize("counts", [[3, 0, 5, 24], [0, 0, 0, 0], [1, 0, 0, 0], [0, 17, 0, 2]])
def test_grouped_mm_equals_the_loop(counts):
    torch.manual_seed(0)
    ends, rows = torch.tensor(counts).cumsum(0), sum(counts) + 3
    x, weight = torch.randn(rows, 32).bfloat16(), torch.randn(4, 32, 48).bfloat16()
    dy, total = torch.randn(rows, 48).bfloat16(), torch.zeros(4, 48, 32)
    out = grouped_matmul(x.cuda(), weight.cuda(), ends.cuda()).cpu()
    assert torch.allclose(out.float(), grouped_matmul(x, weight, ends).float(), atol=0.1, rtol=0.02)
    assert not out[ends[-1] :].any()
    on_gpu = torch.zeros(4, 48, 32, device="cuda")
    add_grouped_product(on_gpu, dy.cuda(), x.cuda(), ends.cuda())
    add_grouped_product(total, dy, x, ends)
    assert torch.allclose(on_gpu.cpu(), total, atol=0.2, rtol=0.02)
