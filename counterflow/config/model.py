"""One frozen dataclass that says what a model is, with the paper's symbols and the sizes that follow.

No torch here: the planner, the pictures and `counterflow --help` read sizes in a blink. What the model is
*trained* with (learning rate, bias speed, MTP weight) is in `run.py`; the balance loss stands here because
the router's forward computes it.

Legend (used by every shape in the package): T tokens, D width, N heads, H content width of a head, R rotary
width, C latent, Q query latent, E experts, K chosen, P pairs of token and expert, A rows arrived, F expert
width, V vocabulary, B sequences, S tokens of one sequence.
"""

from dataclasses import dataclass, field

from counterflow.errors import ConfigError, nearest

MOST, MOST_LAYERS = 2**31 - 1, 2**12
"""Of any size: beyond them are damaged files, whose layers would be counted for ever."""
LARGEST = 2**56
"""Numbers of a matrix: beyond any memory, and few enough for their bytes to be counted."""
AUXILIARY_LOSSES = ("none", "switch", "gshard")


@dataclass(frozen=True)
class Yarn:
    """Long-context scaling of the rotary frequencies, and of the softmax at every length. [§4.3]"""

    factor: float = 40.0
    original_max_positions: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    def __post_init__(self) -> None:
        for name in ("factor", "original_max_positions", "beta_fast", "beta_slow"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"model.yarn.{name} is {getattr(self, name)}; it must be above 0.")


@dataclass(frozen=True)
class Balance:
    """How expert load is kept even. The bias itself moves by `train.bias_speed`; 0 there switches it off."""

    sequence_alpha: float = 1e-4
    """α of the complementary sequence-wise loss (Eq. 17); 0 switches it off."""
    auxiliary: str = "none"
    """The conventional loss, as a baseline: none, switch (fraction × mean probability) or gshard (the same
    with the top-1 fraction)."""
    auxiliary_alpha: float = 1e-3
    """Weight of the conventional loss; V2-Lite's expert-level factor."""

    def __post_init__(self) -> None:
        for name in ("sequence_alpha", "auxiliary_alpha"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"model.balance.{name} is {getattr(self, name)}; it must not be negative.")


@dataclass(frozen=True)
class ModelConfig:
    """A DeepSeek-V3 model. Defaults are the 671B model's where the paper gives them. [§4.2]"""

    vocab_size: int = 129280
    hidden_size: int = 7168
    num_layers: int = 61
    num_dense_layers: int = 3
    """The first layers' FFN is dense; the others are mixtures of experts."""
    num_heads: int = 128
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    q_lora_rank: int = 1536
    """Width of the query latent; 0: queries come straight from the hidden state."""
    kv_lora_rank: int = 512
    dense_intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_routed_experts: int = 256
    num_shared_experts: int = 1
    num_experts_per_token: int = 8
    num_groups: int = 8
    """Groups (nodes) that routed experts are cut into, contiguously."""
    num_limited_groups: int = 4
    """A token's experts lie in at most this many groups."""
    routed_scaling_factor: float = 2.5
    num_mtp_modules: int = 1
    """D of §2.2; 0 trains without multi-token prediction."""
    max_positions: int = 4096
    rope_theta: float = 10000.0
    yarn: Yarn | None = None
    rms_norm_eps: float = 1e-6
    initializer_std: float = 0.006
    """Standard deviation of every weight at the start; norm gains start at 1."""
    balance: Balance = field(default_factory=Balance)

    def __post_init__(self) -> None:
        for name in _AT_LEAST_ONE:
            _require(
                getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}", "it must be at least 1"
            )
        for name in ("num_dense_layers", "q_lora_rank", "num_shared_experts", "num_mtp_modules"):
            _require(
                getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}", "it must not be negative"
            )
        for name in (*_AT_LEAST_ONE, "num_mtp_modules", "num_shared_experts", "q_lora_rank"):
            most = MOST_LAYERS if name in ("num_layers", "num_mtp_modules") else MOST
            _require(
                getattr(self, name) <= most, f"model.{name} is {getattr(self, name)}", f"{most} is the most"
            )
        for name in ("initializer_std", "rms_norm_eps", "routed_scaling_factor"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; it must be above 0.")
        _require(self.rope_theta > 1, f"model.rope_theta is {self.rope_theta}", "it must be above 1")
        self._check_sizes()
        self._check_matrices()
        if self.balance.auxiliary not in AUXILIARY_LOSSES:
            hint = nearest(self.balance.auxiliary, AUXILIARY_LOSSES)
            raise ConfigError(f"model.balance.auxiliary is '{self.balance.auxiliary}'; {hint}")

    def _check_sizes(self) -> None:
        _require(
            self.num_dense_layers <= self.num_layers,
            f"model.num_dense_layers is {self.num_dense_layers} of {self.num_layers} layers",
            "there cannot be more dense layers than layers; lower it or raise model.num_layers",
        )
        _require(
            self.qk_rope_head_dim % 2 == 0,
            f"model.qk_rope_head_dim is {self.qk_rope_head_dim}",
            "rotary positions turn pairs: make it even",
        )
        _require(
            self.num_routed_experts % self.num_groups == 0,
            f"model.num_routed_experts is {self.num_routed_experts} in {self.num_groups} groups",
            "every group holds the same number of experts: make it a multiple of model.num_groups",
        )
        _require(
            self.num_groups == 1 or self.experts_per_group >= 2,
            f"model.num_groups is {self.num_groups} for {self.num_routed_experts} experts",
            "a group is scored by its two best experts: set model.num_groups so that each holds two or more",
        )
        _require(
            self.num_limited_groups <= self.num_groups,
            f"model.num_limited_groups is {self.num_limited_groups} of {self.num_groups} groups",
            "a token cannot use more groups than there are; lower it",
        )
        reachable = self.num_limited_groups * self.experts_per_group
        _require(
            self.num_experts_per_token <= reachable,
            f"model.num_experts_per_token is {self.num_experts_per_token}",
            f"{self.num_limited_groups} groups of {self.experts_per_group} experts offer {reachable}: lower "
            "it or raise model.num_limited_groups",
        )

    def _check_matrices(self) -> None:
        experts = 2 * self.moe_intermediate_size * (self.num_routed_experts + self.num_shared_experts)
        heads = self.num_heads * (self.qk_head_dim + self.v_head_dim)
        widest = max(self.vocab_size, self.dense_intermediate_size, experts, heads)
        inner = max(self.hidden_size, self.q_lora_rank, self.kv_lora_rank)
        _require(
            widest * inner <= LARGEST,
            f"model has a matrix of {widest} × {inner}",
            "no memory holds it: correct its sizes",
        )

    @property
    def experts_per_group(self) -> int:
        """Routed experts of one group."""
        return self.num_routed_experts // self.num_groups

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key: content and rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Mixture-of-experts layers of the main model, MTP modules not counted."""
        return self.num_layers - self.num_dense_layers

    def is_moe(self, layer: int) -> bool:
        """Whether layer `layer` (0-based; MTP modules follow the main model's) has experts."""
        return layer >= self.num_dense_layers


_AT_LEAST_ONE = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_heads",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "dense_intermediate_size",
    "moe_intermediate_size",
    "num_routed_experts",
    "num_experts_per_token",
    "num_groups",
    "num_limited_groups",
    "max_positions",
)


def _require(holds: bool, found: str, must: str) -> None:
    if not holds:
        raise ConfigError(f"{found}; {must}.")
