"""Every item of the report has one home in the code, or stands here with the reason why not.

`docs/PAPER.md` is the printed index; it must equal what the docstrings say today.
"""

from pathlib import Path

import pytest

from counterflow.config import paper

ROOT = Path(__file__).parents[1]

ITEMS = [
    *paper.expand("Eq. 1-25"),
    "Fig. 2",
    "Fig. 3",
    "Fig. 4",
    "Fig. 5",
    "Fig. 9",
    "Tab. 1",
    "Tab. 2",
    "§2.1.2 bias",
    "§2.1.2 node limit",
    "§3.2.1 ZeRO-1",
    "§3.2.2",
    "§3.2.3 EMA",
    "§3.2.3 recomputation",
    "§3.4 redundant experts",
    "§4.1 packing",
    "§4.1 FIM",
    "§4.1 tokenizer",
    "§4.2",
    "§4.2 AdamW",
    "§4.2 start",
    "§4.2 step",
    "§4.3",
    "§5.4.3",
]
"""What is built."""

LATER = {
    "Fig. 6": "the FP8 framework: model/linear.py trains in bf16 or fp32 so far",
    "Fig. 7": "FP8 quantisation and accumulation: comes with kernels for FP8",
    "Fig. 8": "needle in a haystack: comes with long-context evaluation",
    "Tab. 3": "benchmarks of base models: comes with evaluate/",
    "Tab. 4": "the ablation of multi-token prediction: a script in bench/ with its record",
    "Tab. 5": "the ablation of auxiliary-loss-free balance: a script in bench/ with its record",
    "§3.4": "two overlapping batches in inference: come with serving",
}
OUT_OF_SCOPE = {
    "Eq. 26": "GRPO: post-training by reinforcement learning is not what this project is for",
    "Eq. 27": "GRPO",
    "Eq. 28": "GRPO",
    "Fig. 1": "a bar chart of published scores",
    "Fig. 10": "a study of block-wise quantisation (appendix B), a result and not a part",
    "Tab. 6": "scores of the published chat model",
    "Tab. 7": "scores of the published chat model",
    "Tab. 8": "scores of the published chat model as a judge",
    "Tab. 9": "the contribution of distillation, a result of post-training",
}

pytestmark = pytest.mark.pure


def homes(item: str) -> list[str]:
    return [home.name for home in paper.items() if home.item == item]


@pytest.mark.parametrize("item", ITEMS)
def test_each_item_has_one_home(item: str) -> None:
    found = homes(item)
    many = item.startswith("§") and " " not in item
    assert found and (many or len(found) == 1), (
        f"{item} is at home in {found or 'no definition'}; tag exactly one"
    )


def test_every_tag_is_a_known_item() -> None:
    listed = {home.item for home in paper.items()} - {
        home.item for home in paper.items() if home.item == "§4.1"
    }
    assert listed == set(ITEMS), "tags and ITEMS differ; a new item leaves LATER for ITEMS"
    assert not set(ITEMS) & (LATER.keys() | OUT_OF_SCOPE.keys()), "an item is either built or not"


def test_all_numbered_items_of_the_report_are_accounted_for() -> None:
    known = set(ITEMS) | LATER.keys() | OUT_OF_SCOPE.keys()
    every = paper.expand("Eq. 1-28, Fig. 1-10, Tab. 1-9")
    assert set(every) <= known, f"nowhere: {sorted(set(every) - known)}"


def test_printed_index_is_todays() -> None:
    assert (ROOT / "docs" / "PAPER.md").read_text() == paper.index(), "docs/PAPER.md is old; run `make paper`"


@pytest.mark.parametrize("query", ["eq 16", "Eq. 16", "EQ.16", "equation 16", "[Eq. 16]", "eq 16-16"])
def test_a_question_finds_definition_and_tests(query: str) -> None:
    (found,) = paper.find(query)
    assert found.home.name == "counterflow.model.route.choose"
    source = (ROOT / found.home.file).read_text().splitlines()
    assert source[found.home.line - 1].startswith("def choose")
    assert any("test_eq16_bias_picks" in test for test in found.tests)
    assert any("test_eq14_eq16_" in test for test in found.tests)


def test_ranges_sections_words_and_nonsense() -> None:
    assert [found.home.item for found in paper.find("eq 13 - 16")] == ["Eq. 13", "Eq. 14", "Eq. 15", "Eq. 16"]
    assert "§2.1.2 bias" in [found.home.item for found in paper.find("§2.1.2")]
    assert [found.home.item for found in paper.find("section 4.2 adamw")] == ["§4.2 AdamW"]
    assert any("test_eq17_to_20" in test for found in paper.find("eq 18") for test in found.tests)
    assert [found.home.item for found in paper.find("sequence_loss")] == paper.expand("Eq. 17-20")
    assert paper.find("eq 99") == [] == paper.find("") == paper.find("no such thing")


def test_sections_name_their_tests() -> None:
    (found,) = paper.find("4.1 FIM")
    assert found.tests and all("fim" in test for test in found.tests)


def test_a_misspelt_tag_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no item"):
        paper.expand("Eq 16")
