"""`counterflow models`: the named models and their sizes."""

from collections.abc import Sequence

import tyro

from counterflow.config.models import MODELS
from counterflow.plan.count import count_parameters
from counterflow.units import count


def run(arguments: Sequence[str]) -> int:
    """Print the table."""
    tyro.cli(_models, prog="counterflow models", args=arguments)
    return 0


def _models() -> None:
    """List the named models with their parameters: all, active for a token, and the MTP modules' own."""
    print(f"{'model':10}{'total':>12}{'active':>12}{'MTP':>12}  layers  experts")
    for name, model in MODELS.items():
        sizes = count_parameters(model)
        experts = (
            f"{model.num_routed_experts} + {model.num_shared_experts}, top {model.num_experts_per_token}"
        )
        numbers = "".join(f"{count(size):>12}" for size in (sizes.total, sizes.active, sizes.mtp))
        print(f"{name:10}{numbers}  {model.num_layers:>6}  {experts}")
    print(
        "total: the main model, embedding and head included; training adds the MTP modules of the next column."
    )
