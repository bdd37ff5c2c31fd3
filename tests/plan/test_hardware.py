"""Cards and links: their sources, and a user's own numbers."""

from pathlib import Path

import pytest

from counterflow.errors import ConfigError
from counterflow.plan.hardware import CARDS, FABRICS, fast_precision, hardware

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("entry", [*CARDS.values(), *FABRICS.values()], ids=lambda entry: entry.name)
def test_every_entry_has_its_name_and_its_source(entry):
    assert (CARDS.get(entry.name) or FABRICS[entry.name]) == entry
    assert len(entry.source) > 10


def test_hopper_cards_differ_where_their_sheets_do():
    h800, h100, h200 = CARDS["h800"], CARDS["h100"], CARDS["h200"]
    assert h800.bf16_flops == h100.bf16_flops == h200.bf16_flops
    assert h800.nvlink_bytes_per_s < h100.nvlink_bytes_per_s
    assert h200.memory_bytes_per_s > h100.memory_bytes_per_s


def test_a_users_file_replaces_single_numbers_and_says_so(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'base = "h200"\nbase_fabric = "roce400"\n[card]\nbf16_flops = 7e14\n[efficiencies]\nnetwork = 0.5\n'
    )
    mine = hardware(file=str(path))
    assert mine.card.bf16_flops == 7e14 and mine.card.memory_bytes == CARDS["h200"].memory_bytes
    assert mine.fabric == FABRICS["roce400"] and mine.efficiencies.network == 0.5
    assert mine.measured == ("card.bf16_flops", "efficiencies.network")


@pytest.mark.parametrize(
    ("rates", "precision"),
    [
        ("fp32_flops = 66e9", "fp32"),  # the sheet's bf16 is another processor's
        ("bf16_flops = 66e9", "bf16"),
        ("fp32_flops = 66e9\nbf16_flops = 1e9", "fp32"),
        ("fp32_flops = 66e9\nbf16_flops = 99e9", "bf16"),
    ],
)
def test_a_cpu_is_planned_in_what_was_measured_to_be_fast(tmp_path, rates, precision):
    (tmp_path / "mine.toml").write_text(f'base = "cpu"\n[card]\n{rates}\n')
    assert fast_precision(hardware(file=str(tmp_path / "mine.toml"))) == precision


def test_the_example_of_the_page_can_be_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "PLANNER.md").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(page.split("```toml")[1].split("```")[0])
    mine = hardware(file=str(path))
    assert mine.card.gpus_per_node == 4 and "efficiencies.bf16_product" in mine.measured


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('base = "h101"', "did you mean 'h100'?"),
        ("[card]\nbf16_flop = 1.0", "card.bf16_flop is no number of hardware; did you mean 'bf16_flops'?"),
        ("[card]\nbf16_flops = 'fast'", "card.bf16_flops is 'fast'; it must be a number"),
        ("[efficiencies]\nnetwork = 1.5", "efficiencies.network is 1.5; it must lie between 0 and 1"),
        ("[card]\nmemory_bytes_per_s = 0", "card.memory_bytes_per_s is 0; it must be above 0"),
        ("[card]\ngpus_per_node = 0", "card.gpus_per_node is 0; it must be above 0"),
        ("[fabric]\nbytes_per_s = inf", "fabric.bytes_per_s is inf; it must be a finite number from 0 on"),
        ("communication_multiprocessors = 132", "communication_multiprocessors is 132 of 132"),
        ("card = 3", "card is 3 in the hardware file; it must be a table"),
        ("base = 3", "base is 3 in the hardware file"),
        ("[card", "is not TOML"),
    ],
)
def test_a_wrong_file_is_refused_by_name(text, says, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says.replace("?", r"\?")):
        hardware(file=str(path))


def test_a_card_without_fp8_says_what_to_take():
    with pytest.raises(ConfigError, match="a100 has no fp8 products; take --precision bf16"):
        hardware("a100").flops_per_s("fp8")
