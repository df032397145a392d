"""Conditions on the command line: keys, tables, pictures and folders mean what they mean in Python.

Covers: pipelines/condition_keys.py, pipelines/columns.py.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from givens.images import write_rows
from PIL import Image
from small_pipelines import COLUMNS, make_conditioned

from pipelines.condition_keys import SamplesWithCondition
from pipelines.config import UserError
from pipelines.config.command import parse

VALUES = {
    "view": ["lateral", "none of both", None, "frontal"],
    "findings": [["bone"], [], ["metal", "water"], None],
    "age": [63.0, None, 20.5, 88.0],
    "motion": [[1.5, -1.0], [0.0, 2.0], None, [-4.0, 0.25]],
    "label": ["eel", None, "cat", "cat"],
}
"""Values of four images."""


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    return make_conditioned(columns={name: COLUMNS[name] for name in VALUES if name != "label"})


@pytest.fixture(scope="module")
def pictures(pipe, tmp_path_factory):
    """A folder of four pictures, larger than the tokenizer's images."""
    folder = tmp_path_factory.mktemp("outlines")
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 48), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def read(pipe, *argv, count=None, names=None):
    """What a command line gives."""
    config = parse(SamplesWithCondition, list(argv), verb="generate", description="")
    return config.read_condition(pipe, count, names).given


def same(found, expected):
    """Whether two values of `Given` have the same rows."""
    return len(found) == len(expected) and found.names == expected.names and found.digest == expected.digest


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["condition.age=63,null,2e1"], {"age": [63, None, 20]}),
        (["condition.view='none of both'", "condition.findings=[]"], {"view": "none of both", "findings": []}),
        (["condition.view=[lateral, 0]", "condition.findings=bone"], {"view": ["lateral", 0], "findings": ["bone"]}),
        (["condition.age=63", "condition.findings=bone,water"], {"age": 63, "findings": ["bone", "water"]}),
        (["condition.findings=[[bone], [], [metal, water]]"], {"findings": [["bone"], [], ["metal", "water"]]}),
        (["condition.motion=[[1.5, -1], [0, 0]]"], {"motion": [[1.5, -1], [0, 0]]}),
    ],
)
def test_words_are_values_of_their_columns(pipe, words, values):
    assert same(read(pipe, *words), pipe.read_given(condition=values))


def write_table(path, values):
    """Write a row per image, with lists as people write them."""
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    return write_rows(path, rows, lambda value: f"[{', '.join(map(str, value))}]")


def test_columns_of_a_table_that_are_not_those_of_the_pipeline_are_named_and_ignored(pipe, tmp_path, capsys):
    path = write_table(tmp_path / "rows.csv", {"patient": ["a", "b"], "age": [20, 30]})
    assert same(read(pipe, f"conditions={path}"), pipe.read_given(condition={"age": [20, 30]}))
    printed = capsys.readouterr()
    assert "ignored patient;" in printed.out + printed.err


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_has_a_row_per_image(pipe, pictures, tmp_path, suffix):
    """Also with labels, nulls, and pictures as paths relative to it."""
    images = [Image.open(pictures / f"{number}.png") for number in (2, 0, 1)]
    cells = [f"../{pictures.name}/{number}.png" for number in (2, 0, 1)]
    folder = pictures.parent / f"tables{suffix}"
    folder.mkdir()
    values = {**VALUES, "outline" if suffix == ".jsonl" else "outline_file_name": [cells[0], None, *cells[1:]]}
    found = read(pipe, f"conditions={write_table(folder / f'rows{suffix}', values)}")
    assert same(found, pipe.read_given(condition={**VALUES, "outline": [images[0], None, *images[1:]]}))


def test_cells_mean_what_they_mean_to_a_data_set(tmp_path):
    """Truth values and whole floats are names of classes, `;` joins flags, NaN is null, and angles are any numbers."""
    torch.manual_seed(0)
    kinds = {"answer": ["no", "yes"], "digit": ["3", "5"]}
    columns = {name: {"kind": "class", "names": names} for name, names in kinds.items()}
    columns |= {"age": COLUMNS["age"], "findings": COLUMNS["findings"], "wind": {"kind": "angle"}}
    pipe = make_conditioned(columns=columns, outline=False)
    values = {"answer": [True, False, None], "digit": [5.0, 3.0, None], "age": [20.0, math.nan, None]}
    values |= {"findings": ["bone;water", "metal", None], "wind": [370.0, -90.0, None]}
    expected = {"answer": ["yes", "no", None], "digit": ["5", "3", None], "age": [20.0, None, None]}
    expected |= {"findings": [["bone", "water"], ["metal"], None], "wind": [10.0, 270.0, None]}
    for suffix in (".csv", ".jsonl", ".parquet"):
        found = read(pipe, f"conditions={write_table(tmp_path / f'rows{suffix}', values)}")
        assert same(found, pipe.read_given(condition=expected)), suffix
    words = read(pipe, "condition.answer=yes", "condition.wind=370,-90,null")
    assert same(words, pipe.read_given(condition={"answer": "yes", "wind": expected["wind"]}))


def test_a_folder_has_a_picture_per_image(pipe, pictures):
    files = [Image.open(pictures / f"{number}.png") for number in range(4)]
    tokens = pipe.read_given(condition={"outline": files[1]}).raw("outline")[0].tolist()
    for words, value, count in (
        (pictures, files, 4),
        (pictures / "3.png", files[3], 3),
        (f"[{pictures / '3.png'}, null]", [files[3], None], 2),
        (tokens, files[1], 1),
    ):
        found = read(pipe, f"condition.outline={words}", count=count)
        assert same(found, pipe.read_given(condition={"outline": value}, count=count))


def test_rows_and_pictures_are_found_by_the_names_of_images(pipe, pictures, tmp_path):
    """Whatever their order, and however long the path of the image is."""
    table = write_table(
        tmp_path / "rows.jsonl", {"file_name": ["a/0.jpg", "1.jpg", "2.jpg", "b/0.jpg"], "age": VALUES["age"]}
    )
    names = ["/data/images/2.jpg", "images/b/0.jpg", "a/0.jpg"]
    found = read(pipe, f"conditions={table}", count=3, names=names)
    assert same(found, pipe.read_given(condition={"age": [20.5, 88.0, 63.0]}))
    found = read(pipe, f"condition.outline={pictures}", count=2, names=["x/3.jpg", "y/1.tif"])
    assert same(found, pipe.read_given(condition={"outline": [Image.open(pictures / f"{k}.png") for k in (3, 1)]}))


def refusal(pipe, *argv, **options):
    with pytest.raises(UserError) as caught:
        read(pipe, *argv, **options)
    (line,) = str(caught.value).splitlines()
    return line


def test_mistakes_are_one_line(pipe, pictures, tmp_path):
    def table(name, **values):
        return f"conditions={write_table(tmp_path / name, values)}"

    cases = {
        "unknown column 'agee'; did you mean 'age'?": ["condition.agee=3"],
        "condition.age: 2 values for 4 images": ["condition.age=1,2", table("a.csv", view=VALUES["view"])],
        "conditions: 2 rows for 3 images": [table("c.csv", age=[1, 2])],
        "d.csv: row 2: age: expected a number": [table("d.csv", age=[1, "old"])],
        "e.csv: outline: ": [table("e.csv", outline=[str(pictures / "0.png"), "nowhere.png"])],
    }
    for message, argv in cases.items():
        assert message in refusal(pipe, *argv, count=3 if "for 3" in message else None), message


def test_names_without_an_entry_or_with_the_entry_of_another_are_refused(pipe, pictures, tmp_path):
    table = f"conditions={write_table(tmp_path / 'rows.csv', {'file_name': ['1.png'], 'age': [30]})}"
    for key, owns in ((f"condition.outline={pictures}", "no picture for"), (table, "no row with the file_name of")):
        assert f"{owns} a/9" in refusal(pipe, key, names=["a/1.png", "a/9.png"])
        assert re.search(r"a/1\S* or to b/1", refusal(pipe, key, names=["a/1.png", "b/1.png"]))
        assert len(read(pipe, key, names=["a/1.png", "a/1.png"])) == 2, "an image may be given twice"


def test_one_line_warns_about_numbers_outside_the_training_data(pipe, capsys, recwarn):
    pipe(condition=read(pipe, "condition.age=63,120,130"), progress=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: condition: age: ") and "18 to 90" in line and not recwarn.list
    read(pipe, "condition.age=63,null,90")
    assert capsys.readouterr().err == ""
