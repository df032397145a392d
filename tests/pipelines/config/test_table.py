"""Tables of text."""

from pipelines.config.table import count_of, table, wrap_rows


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("name", "value", ""), ("a", "10.5", "of all"), ("longer", "7", "of some")]
    assert table(rows, right=[1]).splitlines() == [
        "name    value",
        "a        10.5  of all",
        "longer      7  of some",
    ]
    assert table([("a", "b"), ("long",), ()]) == "a     b\nlong\n"


def test_a_number_agrees_with_its_noun():
    assert [count_of(number, "image") for number in (0, 1, 2000)] == ["0 images", "1 image", "2,000 images"]


def test_every_cell_is_wrapped_to_its_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert wrap_rows([("key", "small | large", "what a-word it is"), ("b", "x", "text")]) == [
        "  key  small |       what a-word it is",
        "       large",
        "  b    x             text",
    ]
