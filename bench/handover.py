"""What transformers makes of an exported run: logits, greedy text and drafts of the multi-token modules.

    python bench/handover.py runs/tiny

Exports the run three times into a temporary folder, loads each there and here, and prints one line of JSON a
comparison. Logits are compared over held-out code of the standard library in fp32, greedy text over ten prompts.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from counterflow.convert.export import Form, export
from counterflow.convert.load import load_folder
from counterflow.data.tokenizer import Tokenizer
from counterflow.infer.sample import sample_tokens
from counterflow.model.transformer import Transformer
from counterflow.train.restore import model_of

PROMPTS = (
    "def read(",
    "class Error",
    "import ",
    "    if ",
    "# ",
    "return ",
    "for i in",
    "x = ",
    "try:",
    "with open",
)
NEW = 48


def main(run: str) -> None:
    """All comparisons of one run."""
    model, tokenizer = model_of(Path(run))
    with tempfile.TemporaryDirectory() as place:
        for dtype in ("fp32", "bf16", "fp8"):
            folder = Path(place) / dtype
            export(model, tokenizer, folder, Form(dtype))
            back, _ = load_folder(folder)
            line = {"dtype": dtype, **weights(model, back)}
            if dtype != "fp8":
                line |= judged(back, tokenizer, folder)
            print(json.dumps(line), flush=True)


def weights(model: Transformer, back: Transformer) -> dict[str, Any]:
    """How far the imported weights are from the run's, and how far the logits they make."""
    mine, theirs = model.state_dict(), back.state_dict()
    equal = sum(torch.equal(mine[name], theirs[name]) for name in mine)
    worst = max(
        ((mine[name] - theirs[name]).norm() / mine[name].norm().clamp_min(1e-9)).item() for name in mine
    )
    return {"tensors": len(mine), "bit_equal": equal, "worst_relative_norm": worst}


def judged(model: Transformer, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Logits, greedy text, and the same text drafted by the modules."""
    family = transformers.DeepseekV3ForCausalLM
    depths = range(model.config.num_mtp_modules)
    family._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{model.config.num_layers + k}\." for k in depths
    ]
    judge = family.from_pretrained(
        str(folder), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    text = Path(json.__file__).read_text()
    tokens = torch.tensor([[tokenizer.bos, *tokenizer.encode(text)][: model.config.max_positions]])
    with torch.no_grad():
        expected = judge(tokens).logits
        apart = (model.logits(tokens) - expected).abs().max().item()
    plain = drafted = steps = total = 0
    for prompt in PROMPTS:
        ids = [tokenizer.bos, *tokenizer.encode(prompt)]
        stop = frozenset([tokenizer.eos])
        ours = list(sample_tokens(model, ids, NEW, temperature=0, stop=stop))
        plain += ours == written(judge, ids, tokenizer)[0]
        text, calls = written(judge, ids, tokenizer, use_mtp=True)
        drafted += ours == text
        steps, total = steps + calls, total + len(text)
    return {
        "positions": tokens.shape[1],
        "logits_apart": apart,
        "largest_logit": expected.abs().max().item(),
        "greedy_equal": f"{plain}/{len(PROMPTS)}",
        "drafted_equal": f"{drafted}/{len(PROMPTS)}",
        "tokens_per_step_drafted": total / steps,
    }


def written(judge: Any, ids: list[int], tokenizer: Tokenizer, **how: Any) -> tuple[list[int], int]:
    """Greedy tokens without the end token, and the forward passes of the main model they took."""
    calls: list[int] = []
    hook = judge.model.register_forward_hook(lambda *_: calls.append(1))
    given = torch.tensor([ids])
    out = judge.generate(
        given,
        attention_mask=torch.ones_like(given),
        do_sample=False,
        max_new_tokens=NEW,
        pad_token_id=tokenizer.eos,
        **how,
    )
    hook.remove()
    new = out[0, len(ids) :].tolist()
    return new[: new.index(tokenizer.eos)] if tokenizer.eos in new else new, len(calls)


if __name__ == "__main__":
    main(sys.argv[1])
