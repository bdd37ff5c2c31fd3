"""A model of ours as one of lm-eval's, in the same process.

lm-eval finds models by a registry that is filled when their module is imported; it has no entry points for others'. So
`counterflow evaluate tasks` hands it the model itself, and a script writes

    import counterflow.evaluate.harness
    lm_eval.simple_evaluate(model="counterflow", model_args="run=runs/tiny", tasks=[...])

lm-eval fills its registry with its own models when it is asked for one and the registry is empty; it is filled here
first, or ours would hide them. The prompt rule is lm-eval's for causal models: a context's trailing spaces belong to
the continuation, and an empty context is the beginning token.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]
import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from counterflow.comm.mesh import Mesh, device_for
from counterflow.errors import ConfigError
from counterflow.evaluate.complete import Sampling, complete
from counterflow.evaluate.likelihood import nll, window
from counterflow.progress import watched
from counterflow.train.folder import folder_of
from counterflow.train.restore import model_of

MAX_TOKENS = 256
"""Of a text whose task sets no limit; lm-eval's own default."""


@register_model("counterflow")
class CounterflowLM(LM):
    """Likelihoods and texts of a run or an exported folder."""

    def __init__(
        self,
        run: str,
        precision: str = "auto",
        averaged: bool = False,
        device: str | None = "auto",
        max_length: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """`max_length`: tokens that the model sees at once; 0: its positions. lm-eval hands over its own `device` and
        sizes of batches, which change no number here: None and any are taken."""
        super().__init__()
        del batch_size, max_batch_size
        mesh = Mesh(device=torch.device(device_for(device or "auto", 1)))
        self.model, self.vocabulary = model_of(folder_of(run), averaged, precision, mesh)
        self.model.to(mesh.device)
        self.run = Path(run)
        positions = self.model.config.max_positions
        if not 0 <= max_length <= positions:
            raise ConfigError(
                f"max_length is {max_length}; take 1 to {positions}, the model's positions, or 0."
            )
        self.max_length = max_length or positions

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation after its context, whether it is the greedy one) of each request."""
        pairs = [request.args for request in requests]
        return [self._continue(*pair) for pair in watched(pairs, "scoring", len(pairs), "texts")]

    def _continue(self, context: str, continuation: str) -> tuple[float, bool]:
        bare = context.rstrip()
        given = [self.vocabulary.bos, *self.vocabulary.encode(bare)]
        # Encoded together, so that a token may begin at the space between them. Where one goes across the seam, lm-eval
        # keeps the context's own tokens before what is left of the whole text's, and so is it here.
        whole = [self.vocabulary.bos, *self.vocabulary.encode(context + continuation)]
        wanted = len(whole) - len(given)
        if wanted < 1:
            return 0.0, True
        ids = torch.tensor(
            [*given, *whole[len(given) :]][-self.max_length - 1 :],
            device=self.model.head.device,
        )
        log_p, greedy = 0.0, True
        for row, targets in window(self.model, ids, max(1, len(ids) - wanted)):
            log_p += row.gather(1, targets[:, None]).double().sum().item()
            greedy &= bool((row.argmax(-1) == targets).all())
        return log_p, greedy

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of each whole text, in windows that each begin where the one before ended, as lm-eval's interface has
        them."""
        texts = [request.args[0] for request in requests]
        size = self.max_length
        return [
            -nll(self.model, self.vocabulary, text, size, stride=size).double().sum().item()
            for text in watched(texts, "scoring", len(texts), "texts")
        ]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A text for each request, under its own settings."""
        return [
            text
            for request in watched(requests, "writing", len(requests), "texts")
            for text in complete(self.model, self.vocabulary, [request.args[0]], _sampling(request.args[1]))
        ]


def _sampling(given: dict[str, Any]) -> Sampling:
    until: str | Sequence[str] = given.get("until") or ()
    drawn = given.get("do_sample", False)
    return Sampling(
        max_tokens=int(given.get("max_gen_toks", MAX_TOKENS)),
        temperature=float(given.get("temperature", 1.0)) if drawn else 0.0,
        top_p=float(given.get("top_p", 1.0)),
        stops=(until,) if isinstance(until, str) else tuple(until),
    )
