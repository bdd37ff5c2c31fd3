"""Multi-token prediction: D modules in sequence, each looking one token further, the causal chain unbroken.

Module k merges the hidden states of depth k − 1 with the embeddings of the tokens k ahead and runs one whole
layer over them; embedding and head are the main model's own. The embedding comes first in the merge, as the
released weights need it (the report prints the hidden state first; from scratch the order is all one). The
hidden state of depth 0 is the main model's after its final norm, that of depth k the module's after its own.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from counterflow.config.model import ModelConfig
from counterflow.model.debts import Ledger
from counterflow.model.layer import Context, Flow, Layer
from counterflow.model.linear import Linear
from counterflow.model.mla import Norm


class MtpModule(nn.Module):
    """One prediction depth. [Fig. 3, Eq. 22]"""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_norm = Norm(width, eps)
        self.hidden_norm = Norm(width, eps)
        self.join = Linear(2 * width, width)
        self.layer = Layer(config, config.num_layers + depth - 1)
        self.norm = Norm(width, eps)

    def merge(
        self, h: Float[Tensor, "T D"], embedded: Float[Tensor, "T D"], ledger: Ledger | None
    ) -> Float[Tensor, "T D"]:
        """MERGE: M [norm(Emb(t_{i+k})); norm(h_i)]. [Eq. 21]"""
        return self.join(torch.cat([self.embed_norm(embedded), self.hidden_norm(h)], dim=-1), ledger)

    def forward(self, h: Float[Tensor, "T D"], embedded: Float[Tensor, "T D"], context: Context) -> Flow:
        """The depth's hidden states before its final norm."""
        return self.layer(self.merge(h, embedded, context.ledger), context)
