"""The model again, as plainly as it can be said: loops over heads, tokens, experts; autograd for the rest."""

import torch
from torch import Tensor

from counterflow.config.model import ModelConfig
from counterflow.model.rope import rope_table, softmax_scale


class Plain:
    """Losses of samples from a dict of parameters under the package's names."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]) -> None:
        self.config, self.weights = config, weights

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.weights[name]

    def turn(self, x: Tensor, position: int) -> Tensor:
        table = rope_table(self.config, position + 1)[position]
        out = []
        for pair, angle in enumerate(table):
            a, b = x[2 * pair], x[2 * pair + 1]
            out += [a * angle.real - b * angle.imag, a * angle.imag + b * angle.real]
        return torch.stack(out)

    def attention(self, name: str, u: Tensor) -> Tensor:
        c, w = self.config, self.weights
        q_in = u
        if c.q_lora_rank:
            q_in = self.norm(f"{name}.q_norm.weight", u @ w[f"{name}.q_down.weight"].T)
        q_all = q_in @ w[f"{name}.q_up.weight"].T
        down = u @ w[f"{name}.kv_down.weight"].T
        latent = self.norm(f"{name}.kv_norm.weight", down[:, : c.kv_lora_rank])
        kv_all = latent @ w[f"{name}.kv_up.weight"].T
        k_rotary = [self.turn(down[t, c.kv_lora_rank :], t) for t in range(len(u))]
        heads = []
        for head in range(c.num_heads):
            q = q_all[:, head * c.qk_head_dim : (head + 1) * c.qk_head_dim]
            wide = c.qk_nope_head_dim + c.v_head_dim
            kv = kv_all[:, head * wide : (head + 1) * wide]
            rows = []
            for t in range(len(u)):
                query = torch.cat([q[t, : c.qk_nope_head_dim], self.turn(q[t, c.qk_nope_head_dim :], t)])
                keys = [torch.cat([kv[s, : c.qk_nope_head_dim], k_rotary[s]]) for s in range(t + 1)]
                p = torch.softmax(torch.stack(keys) @ query * softmax_scale(c), 0)
                rows.append(p @ kv[: t + 1, c.qk_nope_head_dim :])
            heads.append(torch.stack(rows))
        return torch.cat(heads, -1) @ w[f"{name}.out.weight"].T

    def swiglu(self, gate_up: Tensor, down: Tensor, x: Tensor) -> Tensor:
        a, b = (gate_up @ x).chunk(2)
        return down @ (a / (1 + torch.exp(-a)) * b)

    def choose(self, biased: list[float]) -> list[int]:
        c = self.config
        size = c.experts_per_group
        groups = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c.num_groups)]
        kept = sorted(range(c.num_groups), key=lambda g: -groups[g])[: c.num_limited_groups]
        open_ = [e for e in range(c.num_routed_experts) if e // size in kept]
        return sorted(open_, key=lambda e: -biased[e])[: c.num_experts_per_token]

    def moe(self, name: str, u: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        c, w = self.config, self.weights
        scores = 1 / (1 + torch.exp(-(u @ w[f"{name}.router.score.weight"].T)))
        counts, rows = [0] * c.num_routed_experts, []
        for t in range(len(u)):
            ids = self.choose((scores[t] + w[f"{name}.router.bias"]).tolist())
            out = torch.zeros_like(u[t])
            if c.num_shared_experts:
                out = self.swiglu(w[f"{name}.shared.gate_up"], w[f"{name}.shared.down"], u[t])
            for e in ids:
                counts[e] += 1
                gate = scores[t, e] / scores[t, ids].sum() * c.routed_scaling_factor
                out = out + gate * self.swiglu(
                    w[f"{name}.experts.gate_up"][e], w[f"{name}.experts.down"][e], u[t]
                )
            rows.append(out)
        return torch.stack(rows), self.sequence_loss(scores), counts

    def sequence_loss(self, scores: Tensor) -> Tensor:
        c = self.config
        loss = torch.zeros((), dtype=scores.dtype)
        chosen = scores.topk(c.num_experts_per_token, -1).indices.tolist()
        normal = scores / scores.sum(-1, keepdim=True)
        for e in range(c.num_routed_experts):
            f = (
                sum(e in row for row in chosen)
                * c.num_routed_experts
                / (c.num_experts_per_token * len(scores))
            )
            loss = loss + f * normal[:, e].mean()
        return c.balance.sequence_alpha * loss

    def layer(self, name: str, h: Tensor, counts: list, losses: list) -> Tensor:
        h = h + self.attention(f"{name}.attention", self.norm(f"{name}.attn_norm.weight", h))
        u = self.norm(f"{name}.ffn_norm.weight", h)
        if f"{name}.dense.down" in self.weights:
            gate_up, down = self.weights[f"{name}.dense.gate_up"], self.weights[f"{name}.dense.down"]
            return h + torch.stack([self.swiglu(gate_up, down, x) for x in u])
        out, loss, count = self.moe(name, u)
        counts.append(count), losses.append(loss)
        return h + out

    def nll(self, h: Tensor, targets: Tensor) -> Tensor:
        logits = h @ self.weights["head"].T
        return sum(torch.logsumexp(row, 0) - row[t] for row, t in zip(logits, targets.tolist()))

    def sample(self, tokens: Tensor, mtp_weight: float) -> tuple[Tensor, list[Tensor], list, list]:
        """One sample of S + 1 tokens: (main + λ/D MTP) / S, the sums by depth, counts and balance losses."""
        c, length = self.config, len(tokens) - 1
        counts, losses = [], []
        h = self.weights["embed.weight"][tokens[:-1]]
        for index in range(c.num_layers):
            h = self.layer(f"layers.{index}", h, counts, losses)
        h = self.norm("norm.weight", h)
        sums = [self.nll(h, tokens[1:])]
        total = sums[0] / length
        for k in range(1, c.num_mtp_modules + 1):
            name = f"mtp.{k - 1}"
            hidden = self.norm(f"{name}.hidden_norm.weight", h[: length - k])
            ahead = self.norm(f"{name}.embed_norm.weight", self.weights["embed.weight"][tokens[k:length]])
            h = torch.cat([ahead, hidden], -1) @ self.weights[f"{name}.join.weight"].T
            h = self.norm(f"{name}.norm.weight", self.layer(f"{name}.layer", h, counts, losses))
            sums.append(self.nll(h, tokens[k + 1 :]))
            total = total + mtp_weight / c.num_mtp_modules * sums[-1] / length
        return total, sums, counts, losses
