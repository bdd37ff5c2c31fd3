"""Texts from outside: marks, depth and length that the standard library's readers stumble over, and what is sealed."""

import pytest

from counterflow.errors import ConfigError
from counterflow.notation import from_json, from_toml, sealed, unsealed

pytestmark = pytest.mark.pure
DEEP = 100_000


@pytest.mark.parametrize("read, text", [(from_json, '{"a": 1}'), (from_toml, "a = 1")])
def test_a_mark_at_the_start_is_no_part_of_a_text(read, text):
    assert read(text) == read(text.encode("utf-8-sig")) == {"a": 1}


@pytest.mark.parametrize("read", [from_json, from_toml])
@pytest.mark.parametrize("text", ["[" * DEEP, "a = " + "[" * DEEP, "a = " + "9" * 5000, b"\xff"])
def test_what_cannot_be_read_is_a_value_error_of_one_line(read, text):
    with pytest.raises(ValueError) as found:
        read(text)
    assert "\n" not in str(found.value) and len(str(found.value)) < 200


def test_a_number_of_any_length_hides_nothing_beside_it():
    assert from_json('{"a": "text", "id": ' + "7" * 5000 + "}") == {"a": "text", "id": float("inf")}
    assert from_json("[" + "7" * 308 + ", " + "7" * 400 + "]") == [int("7" * 308), float("inf")]


def test_a_sealed_table_is_read_as_it_was_written_or_not_at_all():
    table = {"name": "é", "numbers": [1, 2.5, None]}
    assert unsealed(sealed(table)) == table == unsealed('{"name": "é", "numbers": [1, 2.5, null]}')
    for changed in (sealed(table).replace("2.5", "2.6"), sealed(table)[:-2], "[1]"):
        with pytest.raises(ValueError):
            unsealed(changed)


def test_an_error_quotes_as_much_as_can_be_read():
    said = str(ConfigError(f"model is '{'x' * 10_000}'; give a name."))
    assert len(said) < 1010 and said.startswith("model is 'xxx") and said.endswith("'; give a name.")
