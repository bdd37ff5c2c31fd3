"""What a cluster is made of: cards, links, and how much of their sheets real work gets. Each number has its source.

A data sheet promises, a kernel delivers a part of it: `Efficiencies` are those parts, one for a kind of operation, and
each says whether it was published, measured or fitted. Nothing else in the planner is tuned. Not taken: a table of
kernel times by shape, which is exact for one card and one release and says nothing of the next.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from counterflow.config.scalar import scalar
from counterflow.errors import ConfigError, nearest
from counterflow.notation import from_toml

Part = TypeVar("Part")
GB, GIB = 1e9, 2.0**30
CPU_FLAGS = Path("/proc/cpuinfo")
"""Where Linux names what the processor can; what is not there counts as without bf16 products."""


@dataclass(frozen=True)
class Card:
    """One accelerator, or the share of a CPU that one process has. Rates are dense peaks, one direction for links."""

    name: str
    bf16_flops: float
    fp8_flops: float
    """0: it has none."""
    fp32_flops: float
    """What fp32 training runs at: TF32's, where the card has it."""
    memory_bytes: float
    """Decimal, as printed; what a driver shows beyond that is left to fragmentation."""
    memory_bytes_per_s: float
    multiprocessors: int
    """0: a CPU, whose transfers and launches take computing time."""
    nvlink_bytes_per_s: float
    """To the other cards of its node together; 0: it has no link of its own."""
    gpus_per_node: int
    """Cards that the fast link joins."""
    watts: float
    launch_s: float
    """Of the host, for one kernel."""
    source: str
    status: str = "data sheet"
    """How its numbers are known."""
    reserved_bytes: float = 1.5e9
    """Taken by the context, libraries' workspaces and NCCL before any tensor; assumed."""

    def nodes(self, count: int) -> int:
        """That so many cards fill, the last one perhaps in part."""
        return -(-count // self.gpus_per_node)


@dataclass(frozen=True)
class Fabric:
    """What joins nodes; one rail a card, so that each has the whole rate."""

    name: str
    bytes_per_s: float
    """Of one card, one direction."""
    latency_s: float
    source: str
    status: str = "data sheet"
    """How its numbers are known."""


@dataclass(frozen=True)
class Efficiencies:
    """The part of its peak that each kind of operation gets. Those marked fitted were fitted once, on H800 timings of
    the public profile-data trace (`FITTED_ON`), never on a step or its published parts, and serve every card."""

    fp8_product: float = 0.4232
    """Fitted: products of weights in FP8, quantisation of their operands included."""
    bf16_product: float = 0.73
    """Measured: grouped products of 32 experts, 718 of 989.5 TFLOP/s (one H200, torch 2.11)."""
    fp32_product: float = 0.73
    """Assumed: as for BF16."""
    grouped_product: float = 1.0
    """Of what products of one matrix reach: the routed experts'. The two rates above were found on both or on these."""
    attention: float = 0.5787
    """Fitted: the attention core in BF16, causal FLOPs, forward and backward together."""
    memory: float = 0.9
    """Published: a copy on an H100 reads and writes 3.0 of 3.35 TB/s; all passes over activations."""
    update: float = 0.9
    """Published: the same copy; passes over gradients, masters and moments, which no cache holds."""
    nvlink: float = 0.8
    """Published: 160 of 200 GB/s on an H800 [§3.2.2; DeepEP README]."""
    network: float = 0.6218
    """Fitted: all-to-all between nodes, bytes on the wire beside computation."""
    collective: float = 0.8
    """Published: 40 of 50 GB/s effective for InfiniBand 400G (arXiv 2505.09343); gradient sums, pipeline sends."""


MAY_BE_NOTHING = (
    "fp8_flops",
    "multiprocessors",
    "nvlink_bytes_per_s",
    "watts",
    "launch_s",
    "reserved_bytes",
    "latency_s",
    "communication_multiprocessors",
)
"""Numbers of hardware that 0 has a meaning for."""
FITTED = ("fp8_product", "attention", "network")
"""The efficiencies that were fitted; tests/plan holds them against the fit."""


@dataclass(frozen=True)
class Hardware:
    """A cluster's kind: card, fabric, efficiencies. How many cards is the layout's business."""

    card: Card
    fabric: Fabric
    efficiencies: Efficiencies = field(default_factory=Efficiencies)
    communication_multiprocessors: int = 20
    """Taken from computation while a transfer runs beside it [§3.2.2]."""
    measured: tuple[str, ...] = ()
    """Names of the numbers that the user measured, such as card.bf16_flops."""

    @property
    def is_cpu(self) -> bool:
        """Whether a card is the share of a CPU that one process has."""
        return not self.card.multiprocessors

    @property
    def unit(self) -> str:
        """What a card is called where there are many."""
        return "process" if self.is_cpu else "GPU"

    @property
    def compute_share(self) -> float:
        """Of the multiprocessors that is left beside a transfer."""
        total = self.card.multiprocessors
        return 1.0 - self.communication_multiprocessors / total if total else 1.0

    def flops_per_s(self, precision: str) -> float:
        """What products of weights reach; `precision` is fp8, bf16 or fp32.   Fails: ConfigError."""
        peak = {
            "fp8": self.card.fp8_flops,
            "bf16": self.card.bf16_flops,
            "fp32": self.card.fp32_flops,
        }[precision]
        if not peak:
            raise ConfigError(
                f"{self.card.name} has no {precision} products; take --precision bf16 or another card."
            )
        return peak * getattr(self.efficiencies, f"{precision}_product")


_HOPPER = Card(
    name="h100",
    bf16_flops=989.5e12,
    fp8_flops=1979e12,
    fp32_flops=494.7e12,
    memory_bytes=80 * GB,
    memory_bytes_per_s=3.35e12,
    multiprocessors=132,
    nvlink_bytes_per_s=450 * GB,
    gpus_per_node=8,
    watts=700,
    launch_s=7.6e-6,
    source="NVIDIA H100 SXM5 data sheet (dense rates); NVLink 4 is 900 GB/s both ways; launches measured on an H200",
)
CARDS: Mapping[str, Card] = {
    "h100": _HOPPER,
    "h800": replace(
        _HOPPER,
        name="h800",
        nvlink_bytes_per_s=200 * GB,
        source="as the H100, with NVLink at 400 GB/s both ways (DeepSeek-V3 report §3.2.2; arXiv 2505.09343 §3.1)",
    ),
    "h200": replace(
        _HOPPER,
        name="h200",
        memory_bytes=141 * GB,
        memory_bytes_per_s=4.8e12,
        source="NVIDIA H200 SXM data sheet: an H100 with 141 GB at 4.8 TB/s",
    ),
    "b200": Card(
        name="b200",
        bf16_flops=2250e12,
        fp8_flops=4500e12,
        fp32_flops=1100e12,
        memory_bytes=180 * GB,
        memory_bytes_per_s=8e12,
        multiprocessors=148,
        nvlink_bytes_per_s=900 * GB,
        gpus_per_node=8,
        watts=1000,
        launch_s=7.6e-6,
        source="NVIDIA Blackwell architecture brief, HGX B200 at 1000 W (dense rates); 180 GB usable",
    ),
    "gb200": Card(
        name="gb200",
        bf16_flops=2500e12,
        fp8_flops=5000e12,
        fp32_flops=1250e12,
        memory_bytes=186 * GB,
        memory_bytes_per_s=8e12,
        multiprocessors=148,
        nvlink_bytes_per_s=900 * GB,
        gpus_per_node=72,
        watts=1200,
        launch_s=7.6e-6,
        source="NVIDIA GB200 NVL72 data sheet divided by 72 (dense rates); one NVLink domain of 72",
    ),
    "a100": Card(
        name="a100",
        bf16_flops=312e12,
        fp8_flops=0.0,
        fp32_flops=156e12,
        memory_bytes=80 * GB,
        memory_bytes_per_s=2.039e12,
        multiprocessors=108,
        nvlink_bytes_per_s=300 * GB,
        gpus_per_node=8,
        watts=400,
        launch_s=7.6e-6,
        source="NVIDIA A100 80GB SXM data sheet; NVLink 3 is 600 GB/s both ways",
    ),
    "cpu": Card(
        name="cpu",
        bf16_flops=206e9,
        fp8_flops=0.0,
        fp32_flops=84e9,
        memory_bytes=8 * GIB,
        memory_bytes_per_s=8e9,
        multiprocessors=0,
        nvlink_bytes_per_s=4e9,
        gpus_per_node=1024,
        watts=25,
        launch_s=6e-6,
        source="one core of a virtual AMD EPYC, products of 2048³ measured on two; measure yours (docs/PLANNER.md)",
        status="measured elsewhere",
        reserved_bytes=0.4e9,
    ),
}
"""Cards by name. To add one, add an entry with its source."""

FABRICS: Mapping[str, Fabric] = {
    "ib400": Fabric(
        "ib400", 50 * GB, 3.7e-6, "InfiniBand NDR 400 Gb/s a card; across leaves (arXiv 2505.09343 §5.2)"
    ),
    "roce400": Fabric(
        "roce400", 50 * GB, 5.6e-6, "RoCE 400 Gb/s a card; across leaves (arXiv 2505.09343 §5.2)"
    ),
    "ethernet": Fabric(
        "ethernet", 12.5 * GB / 8, 30e-6, "one 100 Gb/s port (IEEE 802.3ba) for 8 cards, TCP latency"
    ),
    "loopback": Fabric(
        "loopback",
        2 * GB,
        50e-6,
        "processes of one machine over gloo; measure yours (docs/PLANNER.md)",
        "assumed",
    ),
}
"""Fabrics by name. To add one, add an entry with its source."""


def hardware(card: str = "h800", fabric: str = "", file: str = "") -> Hardware:
    """The named kind of cluster, or a TOML file's, whose tables card, fabric and efficiencies replace single numbers.

    Fails: ConfigError for an unknown name or key, or a number that cannot be.
    """
    tree = _read(Path(file)) if file else {}
    card = _text(tree.pop("base", card), "base")
    fabric = _text(
        tree.pop("base_fabric", fabric or ("loopback" if card == "cpu" else "ib400")), "base_fabric"
    )
    found = Hardware(_named(card, CARDS, "card"), _named(fabric, FABRICS, "fabric"))
    measured: list[str] = []
    for name, part in (("card", found.card), ("fabric", found.fabric), ("efficiencies", found.efficiencies)):
        changed = _replaced(part, tree.pop(name, {}), name)
        measured += [f"{name}.{key}" for key in changed]
        found = replace(found, **{name: replace(part, **changed)})
    rest = _replaced(found, tree, "hardware")
    found = replace(found, **rest, measured=tuple(measured))
    if found.card.multiprocessors and found.compute_share <= 0:
        raise ConfigError(
            f"communication_multiprocessors is {found.communication_multiprocessors} of {found.card.multiprocessors} "
            "multiprocessors; computation needs some: take a smaller number."
        )
    return found


def fast_precision(kind: Hardware) -> str:
    """What training does best on it: bf16 on GPUs; on a CPU by its measured rates, or else as this processor has it."""
    if not kind.is_cpu:
        return "bf16"
    rates = [precision for precision in ("fp32", "bf16") if f"card.{precision}_flops" in kind.measured]
    if rates:  # `counterflow bench rates` measures one, in what the processor multiplies fast
        return max(rates, key=kind.flops_per_s)
    try:
        flags = CPU_FLAGS.read_text(encoding="utf-8").split()
    except OSError:
        return "fp32"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "fp32"


def _named(name: str, table: Mapping[str, Part], what: str) -> Part:
    if name not in table:
        raise ConfigError(
            f"'{name}' is no known {what}; {nearest(name, table)} Or describe yours with --hardware FILE."
        )
    return table[name]


def _read(path: Path) -> dict[str, Any]:
    try:
        return from_toml(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a hardware .toml file.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}; correct that line.") from None


def _text(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{key} is {value!r} in the hardware file; it must be a name in quotes.")
    return value


def _replaced(part: Any, given: object, where: str) -> dict[str, Any]:
    """The given numbers, of the right types and none impossible."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where} is {given!r} in the hardware file; it must be a table, [{where}].")
    known = {item.name: cast(type, item.type) for item in fields(part) if item.type in (int, float, str)}
    changed: dict[str, Any] = {}
    for key, value in cast("Mapping[str, Any]", given).items():
        if key not in known:
            raise ConfigError(f"{where}.{key} is no number of hardware; {nearest(key, known)}")
        changed[key] = found = scalar(value, known[key], f"{where}.{key}")
        highest = 1.0 if where == "efficiencies" and key != "grouped_product" else float("inf")
        if isinstance(found, str):
            continue
        if not 0 <= found <= highest or found == float("inf"):
            most = f"lie between 0 and {highest:g}" if highest == 1 else "be a finite number from 0 on"
            raise ConfigError(f"{where}.{key} is {found}; it must {most}.")
        if not found and key not in MAY_BE_NOTHING:
            raise ConfigError(f"{where}.{key} is 0; it must be above 0: leave it out to keep the card's.")
    return changed
