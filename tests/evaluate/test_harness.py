"""lm-eval asks for likelihoods and texts, and gets the model's own."""

from dataclasses import replace

import pytest
import torch

from counterflow.convert.export import Form, export
from counterflow.evaluate.complete import Sampling, complete
from counterflow.evaluate.likelihood import nll
from tests.data.test_tokenizer import learnt
from tests.model.configs import BASE, random_model

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's own and its dependencies'

CONFIG = replace(BASE, vocab_size=300)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    from lm_eval.api.registry import get_model

    import counterflow.evaluate.harness  # noqa: F401  registers

    place = tmp_path_factory.mktemp("harness")
    export(random_model(CONFIG), learnt(place), place / "out", Form("fp32"))
    return get_model("counterflow").create_from_arg_string(f"run={place / 'out'},precision=fp32")


def asked(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_the_likelihood_of_a_continuation_is_that_of_its_tokens(lm):
    tokenizer, model = lm.vocabulary, lm.model
    for context, continuation in (
        ("def f(x):", " return"),
        ("def f(x): ", "return"),
        ("", "that"),
        ("x", ""),
    ):
        ((found, greedy),) = lm.loglikelihood([asked("loglikelihood", context, continuation)])
        ids = [tokenizer.bos, *tokenizer.encode(context + continuation)]
        begin = 1 + len(tokenizer.encode(context.rstrip()))
        with torch.no_grad():
            log_p = model.logits(torch.tensor([ids]))[0].log_softmax(-1)
        expected = sum(log_p[place - 1, ids[place]].item() for place in range(begin, len(ids)))
        assert found == pytest.approx(expected, abs=1e-4)
        assert greedy == all(log_p[place - 1].argmax() == ids[place] for place in range(begin, len(ids)))


def test_rolling_likelihoods_and_texts_are_the_models(lm):
    text = "def f(x):\n return 12345 " * 24
    (found,) = lm.loglikelihood_rolling([asked("loglikelihood_rolling", text)])
    size = CONFIG.max_positions
    apart = nll(lm.model, lm.vocabulary, text, size, stride=size)
    assert len(apart) > 2 * size and found == pytest.approx(-apart.sum().item(), rel=1e-5)
    settings = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    (written,) = lm.generate_until([asked("generate_until", "def", settings)])
    assert [written] == list(complete(lm.model, lm.vocabulary, ["def"], Sampling(6, stops=("\n",))))


@pytest.mark.parametrize("windows", [0.5, 1, 2, 7])
def test_rolling_likelihoods_are_those_of_lm_evals_own_backend(lm, windows):
    """On the same fp32 export; windows that overlap gave another number wherever a text is longer than one. The backend
    sets the beginning token itself, so the exported tokenizer must not."""
    pytest.importorskip("accelerate", reason="lm-eval's backend hf needs it: pip install 'lm-eval[hf]'")
    from lm_eval.api.registry import get_model

    theirs = get_model("hf").create_from_arg_string(
        f"pretrained={lm.run},dtype=float32,device=cpu,add_bos_token=False"
    )
    tokens = lm.vocabulary.encode("def f(x):\n return 12345 (end)\n" * 60)[
        : int(windows * CONFIG.max_positions)
    ]
    request = asked("loglikelihood_rolling", lm.vocabulary.decode(tokens))
    (expected,), (found,) = theirs.loglikelihood_rolling([request]), lm.loglikelihood_rolling([request])
    assert found == pytest.approx(expected, rel=1e-4)


def test_a_greedy_continuation_is_called_greedy(lm):
    """Of contexts whose likeliest next token stays a token of its own when text is encoded again."""
    tokenizer, model = lm.vocabulary, lm.model
    tried = 0
    for context in ("that", "def f", "12", "paar", "return", "x", "(end)", "ein", "+", "Wör"):
        ids = tokenizer.encode(context)
        best = int(model.logits(torch.tensor([[tokenizer.bos, *ids]]))[0, -1].argmax())
        if tokenizer.encode(context + tokenizer.decode([best])) == [*ids, best]:
            ((_, greedy),) = lm.loglikelihood([asked("loglikelihood", context, tokenizer.decode([best]))])
            assert greedy
            tried += 1
    assert tried
