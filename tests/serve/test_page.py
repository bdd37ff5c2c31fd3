"""The page to try a model on, in a real browser: typed into, clicked, and compared with what the server says."""

import json
import time

import pytest

from tests.serve.chromium import BROWSER, tab
from tests.serve.service import learnt, running

pytestmark = pytest.mark.skipif(not BROWSER, reason="no Chromium here: the page is not clicked")
PROMPT = "the pipeline "
TEXT, SAID = "document.querySelector('#text').value", "document.querySelector('#said').textContent"
RESTING = "!document.querySelector('#go').disabled && document.querySelector('#stop').disabled"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return learnt(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with tab(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(autouse=True)
def afresh(page):
    page.events.clear()


def asked(page, **fields):
    for name, value in fields.items():
        page.type(f"#{name}", str(value))
    page.click("#go")


def test_the_page_writes_on_what_was_typed(page, tokenizer):
    with running(tokenizer) as server:
        home = f"http://127.0.0.1:{server.port}/"
        page.open(home)
        assert page.value("document.body.scrollWidth <= innerWidth")
        assert (
            page.value("document.querySelector('h1').textContent + document.title") == "toytoy · Counterflow"
        )
        assert page.value("document.querySelector('#key').getBoundingClientRect().width") == 0, (
            "no key is needed"
        )
        assert not page.value(f"{TEXT} !== {TEXT}.trim()"), "a space behind the prompt makes worse tokens"
        asked(page, text=PROMPT, max_tokens=24, temperature=0, top_p=1)
        assert page.wait(f"{RESTING} && {SAID}").startswith("24 tokens in ")
        whole = page.value(TEXT)
        said = server.complete(prompt=PROMPT, max_tokens=24, temperature=0)["choices"][0]["text"]
        assert whole == PROMPT + said and len(said) > 10
        # Once more, from where it stands now: what was written is the next prompt.
        page.click("#go")
        page.wait(f"{RESTING} && {TEXT} !== {json.dumps(whole)}")
        said = server.complete(prompt=whole, max_tokens=24, temperature=0)["choices"][0]["text"]
        assert page.value(TEXT) == whole + said
    assert page.fetched() and all(url.startswith(home) for url in page.fetched())
    assert not page.troubles()


def test_stop_ends_the_text_here_and_on_the_server(page, tokenizer, monkeypatch):
    with running(tokenizer) as server:
        engine, run = server.service.engine, server.service.engine.run

        def slowly(works):
            time.sleep(0.05)
            return run(works)

        monkeypatch.setattr(engine, "run", slowly)
        page.open(f"http://127.0.0.1:{server.port}/")
        asked(page, text=PROMPT, max_tokens=200, temperature=1)
        page.wait(f"{TEXT}.length > {len(PROMPT)}")
        page.click("#stop")
        page.wait(f"{RESTING} && {SAID} === 'Stopped.'")
        server.settle()
        written = engine.statistics.tokens
        assert 0 < written < 150, "the server wrote on"
    assert not page.troubles()


def test_the_page_shows_errors_and_sends_the_key(page, tokenizer):
    with running(tokenizer, api_key="secret") as server:
        page.open(f"http://127.0.0.1:{server.port}/")
        asked(page, text=PROMPT, max_tokens=3, temperature=0)
        assert "key" in page.wait(f"{RESTING} && {SAID}")
        assert page.value(TEXT) == PROMPT
        asked(page, key="secret")
        assert page.wait(f"{RESTING} && {SAID}.includes('tokens/s') && {SAID}").startswith("3 tokens in ")
        asked(page, text="a" * 4000)
        page.wait(f"{RESTING} && {SAID}.includes('context length') && {SAID}")
    # Of the answers with an error, and of nothing else, the console says so by itself.
    assert len(page.troubles()) == 2 and all("status of 40" in each for each in page.troubles())
