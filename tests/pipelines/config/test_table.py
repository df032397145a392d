"""Tables of text."""

from pipelines.config.table import table, wrap_rows


def test_columns_are_as_wide_as_their_widest_cell():
    rows = [("name", "value", ""), ("a", "10.5", "of all"), ("longer", "7", "of some")]
    assert table(rows, right=[1]).splitlines() == [
        "name    value",
        "a        10.5  of all",
        "longer      7  of some",
    ]
    assert table([("a", "b"), ("long",), ()]) == "a     b\nlong\n"


def test_every_cell_is_wrapped_to_its_column(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert wrap_rows([("key", "small | large", "what a-word it is"), ("b", "x", "text")]) == [
        "  key  small |       what a-word it is",
        "       large",
        "  b    x             text",
    ]
