"""The whole model in one process: embedding, layers, final norm, MTP modules, head. The plain loop that every
parallel path is held against.

A sample is S + 1 tokens: S inputs with their S next-token targets; prediction depth k has S − k targets left.
The loss of a token is seeded with 1 / (target tokens of the global batch) and every reduction is a sum, so
micro-batches and ranks add up to the same gradient however the batch is cut. Counts of routed tokens are
returned, not stored.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from counterflow.comm.dispatch import Dispatcher
from counterflow.comm.local import Local
from counterflow.config.model import ModelConfig
from counterflow.errors import ConfigError
from counterflow.kernels.head import cross_entropy
from counterflow.model.debts import Ledger, main_grad
from counterflow.model.experts import Experts, Shard
from counterflow.model.layer import Context, Flow, Layer
from counterflow.model.mla import Norm
from counterflow.model.mtp import MtpModule
from counterflow.model.rope import rope_table


@dataclass(frozen=True)
class Losses:
    """What a pass over samples gives."""

    total: Float[Tensor, ""]
    """Scaled main + λ/D Σ MTP + balance losses: what backward starts from."""
    nll: tuple[Float[Tensor, ""], ...]
    """Unscaled sums of −log p in nats: the main model's, then each depth's."""
    balance: Float[Tensor, ""]
    """Scaled balance losses of all layers."""
    counts: Int[Tensor, "L E"]
    """Tokens given to each expert of each MoE layer, MTP's last."""


class Embedding(nn.Module):
    """Rows of the embedding matrix; its gradient is added on the spot, since nothing waits for less."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, width))

    def forward(self, tokens: Int[Tensor, "*T"], ledger: Ledger | None = None) -> Float[Tensor, "T D"]:
        """EMBED: one row a token, flattened."""
        return _Embed.apply(tokens.flatten(), self.weight, ledger)  # pyright: ignore[reportReturnType]


class Transformer(nn.Module):
    """A DeepSeek-V3 model with its MTP modules."""

    rope: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.dispatcher: Dispatcher = Local()
        self.embed = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_layers))
        self.norm = Norm(config.hidden_size, config.rms_norm_eps)
        self.head = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.mtp = nn.ModuleList(MtpModule(config, depth) for depth in range(1, config.num_mtp_modules + 1))
        self.register_buffer("rope", rope_table(config, config.max_positions), persistent=False)
        self.recompute = "none"

    def context(self, sequences: int, length: int, **settings: Any) -> Context:
        """A pass over `sequences` sequences of `length` tokens."""
        again = self.recompute == "attention"
        return Context(sequences, self.rope_for(length), self.dispatcher, recompute=again, **settings)

    def rope_for(self, length: int) -> Complex[Tensor, "S R2"]:
        """The rotary table of the first `length` positions, on the model's device."""
        if length > len(self.rope):
            raise ConfigError(
                f"a sequence has {length} tokens; the model has {len(self.rope)} positions: shorten it, or raise "
                "model.max_positions."
            )
        return self.rope[:length]

    def forward(
        self,
        samples: Int[Tensor, "B S1"],
        scale: float | None = None,
        mtp_weight: float = 0.0,
        ledger: Ledger | None = None,
    ) -> Losses:
        """Losses of samples of S + 1 tokens; `scale` is 1 / (B S) unless the batch is larger. [Eq. 25]

        MTP modules run only where `mtp_weight` (λ) is above 0.   Cost of keeping activations: see
        `recompute`.
        """
        sequences, length = samples.shape[0], samples.shape[1] - 1
        scale = 1.0 / (sequences * length) if scale is None else scale
        context = self.context(sequences, length, ledger=ledger, sequence_scale=scale * length)
        h, flows = self.trunk(samples[:, :-1], context)
        total, nll = head_loss(h, self.head, samples[:, 1:], scale, ledger)
        nlls = [nll]
        for depth, module in enumerate(self.mtp if mtp_weight else (), start=1):
            h = h.view(sequences, -1, h.shape[-1])[:, :-1].flatten(0, 1)
            h, flow = self.deepen(module, h, samples[:, depth:-1], context)
            flows.append(flow)
            weight = scale * mtp_weight / len(self.mtp)
            loss, nll = head_loss(h, self.head, samples[:, depth + 1 :], weight, ledger)
            total = total + loss
            nlls.append(nll)
        balances = [flow.balance for flow in flows if flow.balance is not None]
        balance = torch.stack(balances).sum() if balances else total.new_zeros(())
        counts = [flow.counts for flow in flows if flow.counts is not None]
        experts = self.config.num_routed_experts
        stacked = torch.stack(counts) if counts else torch.zeros(0, experts, dtype=torch.int64)
        return Losses(total + balance, tuple(nlls), balance.detach(), stacked)

    def trunk(self, tokens: Int[Tensor, "B S"], context: Context) -> tuple[Float[Tensor, "T D"], list[Flow]]:
        """Hidden states after the final norm, and the layers' flows."""
        h, flows = self.embed(tokens, context.ledger), []
        for layer in self.layers:
            flow = self._run(layer, h, context)
            h = flow.h
            flows.append(flow)
        return self.norm(h), flows

    def deepen(
        self, module: nn.Module, h: Float[Tensor, "T D"], ahead: Int[Tensor, "B S"], context: Context
    ) -> tuple[Float[Tensor, "T D"], Flow]:
        """One MTP depth further: hidden states after the module's final norm, and its layer's flow."""
        assert isinstance(module, MtpModule), "only an MTP module goes one depth further"
        context = replace(context, rope=context.rope[: ahead.shape[1]])
        flow = self._run(module, h, self.embed(ahead, context.ledger), context)
        return module.norm(flow.h), flow

    def logits(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Next-token logits of the main model; MTP modules take no part."""
        h, _ = self.trunk(tokens, self.context(*tokens.shape))
        return (h @ self.head.t()).view(*tokens.shape, -1)

    def draft_logits(self, tokens: Int[Tensor, "B S"]) -> list[Float[Tensor, "B Sk V"]]:
        """Logits of each MTP depth k for positions 0 … S − k − 1, each for the token k + 1 ahead. [Eq. 23]"""
        context = self.context(*tokens.shape)
        h, _ = self.trunk(tokens, context)
        drafts = []
        for depth, module in enumerate(self.mtp, start=1):
            h = h.view(len(tokens), -1, h.shape[-1])[:, :-1].flatten(0, 1)
            h, _ = self.deepen(module, h, tokens[:, depth:], context)
            drafts.append((h @ self.head.t()).view(len(tokens), -1, len(self.head)))
        return drafts

    def _run(self, module: nn.Module, *inputs: Any) -> Flow:
        if self.recompute == "layer" and torch.is_grad_enabled():
            flow = checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(flow, Flow), "a layer gives a Flow"
            return flow
        return module(*inputs)


def moe_layers(model: Transformer) -> Iterator[tuple[int, str, Layer]]:
    """(index, name, layer) of every MoE layer here, MTP's behind the model's; a pipeline's rank lacks some."""
    named: list[tuple[int, str, nn.Module]] = [
        (index, f"layers.{index}", layer) for index, layer in enumerate(model.layers)
    ]
    for index, module in enumerate(model.mtp):
        if isinstance(module, MtpModule):
            named.append((len(model.layers) + index, f"mtp.{index}", module.layer))
    for index, name, layer in named:
        if isinstance(layer, Layer) and layer.is_moe:
            yield index, name, layer


def named_routers(model: Transformer) -> Iterator[tuple[int, str, Tensor]]:
    """(row in `Losses.counts`, layer's name, bias) of every MoE layer here."""
    for index, name, layer in moe_layers(model):
        yield index - model.config.num_dense_layers, name, layer.router.bias


def head_loss(
    h: Float[Tensor, "T D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "B S"],
    scale: float,
    ledger: Ledger | None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """HEAD: scale × Σ −log p(target), to differentiate, and the plain sum in nats. [Eq. 24]"""
    return _HeadLoss.apply(h, weight, targets.flatten(), scale, ledger, torch.is_grad_enabled())  # pyright: ignore[reportReturnType]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, targets: Tensor, scale: float, ledger: Any, grad: bool
    ) -> Any:
        dweight = None
        if grad and any(ctx.needs_input_grad[:2]):
            wide = torch.promote_types(weight.dtype, torch.float32)
            dweight = torch.zeros_like(weight, dtype=wide) if ledger is None else main_grad(weight)
        nll, dh = cross_entropy(h, weight, targets, dweight, scale)
        ctx.save_for_backward(*(() if dh is None else (dh, dweight) if ledger is None else (dh,)))
        ctx.dtype = weight.dtype
        total = nll.sum()
        ctx.mark_non_differentiable(total)
        return total * scale, total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dh, *dweight = ctx.saved_tensors
        if not dweight:
            # The head's gradient was added in forward, seeded with 1, so the loss must be the root of
            # backward.
            return dh, None, None, None, None, None
        return dh * dloss.to(dh.dtype), (dweight[0] * dloss).to(ctx.dtype), None, None, None, None


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, ledger: Ledger | None) -> Tensor:
        ctx.ledger, ctx.weight = ledger, weight
        ctx.save_for_backward(tokens, weight)
        return weight[tokens]

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, weight = ctx.saved_tensors
        if ctx.ledger is None:
            return None, torch.ops.aten.embedding_dense_backward(dh, tokens, len(weight), -1, False), None
        total = main_grad(ctx.weight)
        if total.is_cuda:  # index_add_ sums in any order there, and a run must repeat bit for bit
            wide = dh.to(total.dtype)
            total.add_(torch.ops.aten.embedding_dense_backward(wide, tokens, len(weight), -1, False))
        else:
            total.index_add_(0, tokens, dh.to(total.dtype))
        return None, None, None


def keep_experts(model: Transformer, index: int, parts: int) -> None:
    """Hold only one of equal parts of every layer's experts; the dispatcher must know who holds the others.

    Fails: ConfigError where they cannot be parted so.
    """
    if model.config.num_routed_experts % parts:
        raise ConfigError(
            f"a layer has {model.config.num_routed_experts} experts and {parts} ranks share them; each must hold as "
            "many: take a divisor."
        )
    for module in model.modules():
        if isinstance(module, Experts):
            module.keep(index, parts)


def expert_shards(model: Transformer) -> dict[str, Shard]:
    """Of the parameters that hold some of a layer's experts: which."""
    return {
        f"{path}.{name}": module.shard(weight)
        for path, module in model.named_modules()
        if isinstance(module, Experts) and module.parts > 1
        for name, weight in module.named_parameters()
    }


def initialise(model: Transformer, seed: int) -> None:
    """Normal weights, gains 1, biases 0; a function of seed and name alone, whatever else is held. [§4.2 start]

    Drawn in fp32 on the CPU, so that every device, precision and layout starts from the same numbers. A part of the
    experts draws them all and keeps its own.
    """
    shards = expert_shards(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 1:
                value.fill_(1.0)
            else:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                shard = shards.get(name, Shard(0, value.numel()))
                drawn = torch.empty(shard.total // value[0].numel(), *value.shape[1:], dtype=torch.float32)
                drawn.normal_(0.0, model.config.initializer_std, generator=generator)
                value.copy_(drawn.flatten()[shard.offset : shard.offset + value.numel()].view(value.shape))
        for _, _, bias in named_routers(model):
            bias.zero_()
