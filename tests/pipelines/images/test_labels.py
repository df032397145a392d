"""The classes of images: what may be one, and what it may be called."""

import os

import pytest
from givens.image_files import load, rows_of, write_parquet, write_tar
from givens.image_folders import config, write_folder

from pipelines.config import UserError
from pipelines.images import load_images
from pipelines.saving import check_labels
from pipelines.tokens.meta import check_printable

ASTRONAUT = "\U0001f469\u200d\U0001f680"  # two emoji and a joiner, which is not printable by itself


REFUSED = "^the class .* is no name: at most 200 printable characters; data.label_column=null uses all"


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", os.fsdecode(b"caf\xe9")])
def test_a_folder_that_no_class_may_be_called_by_is_refused_when_images_are_found(tmp_path, name):
    """Else the tokens are made, and cannot be loaded."""
    write_folder(tmp_path, classes=("cat", name))
    with pytest.raises(UserError, match=REFUSED):
        load_images(config(tmp_path))
    assert load_images(config(tmp_path, label_column=None)).train.labels is None


def test_a_name_too_long_for_a_pipeline_is_refused_when_images_are_found(tmp_path):
    rows = [(key, data, "x" * (200 + (k == 3))) for k, (key, data, _) in enumerate(rows_of(8))]
    with pytest.raises(UserError, match=REFUSED):
        load(write_tar(tmp_path / "a.tar", rows))
    assert load(write_tar(tmp_path / "b.tar", rows[:3])).train.class_names == ["x" * 200]


def test_an_emoji_of_two_is_a_class_everywhere(tmp_path):
    write_folder(tmp_path, classes=(ASTRONAUT, "dog"))
    assert load_images(config(tmp_path)).train.class_names == ["dog", ASTRONAUT]
    check_labels([ASTRONAUT])
    assert check_printable(ASTRONAUT) == ASTRONAUT


def test_splits_have_the_same_classes(tmp_path):
    """Their numbers would mean others: 0 is a cat here and a dog there."""
    write_parquet(tmp_path / "train-0.parquet", rows_of(6, 2), names=["cat", "dog"])
    write_parquet(tmp_path / "test-0.parquet", rows_of(6, 2), names=["dog", "cat"])
    for streaming in (False, True):
        with pytest.raises(UserError, match="^data.label_column: .* other classes "):
            load(tmp_path, streaming=streaming)
        assert load(tmp_path, label_column=None, streaming=streaming).held_out.labels is None


def test_a_number_and_the_same_word_are_one_class(tmp_path):
    rows = [(key, data, '{"label": 1}' if k % 2 else '{"label": "1"}') for k, (key, data, _) in enumerate(rows_of(8))]
    train = load(write_tar(tmp_path / "a.tar", rows, label="json")).train
    assert train.class_names == ["1"] and set(train.labels.tolist()) == {0}


def test_what_only_begins_as_a_number_is_a_word(tmp_path):
    rows = [(key, data, ("--5", "7")[k % 2]) for k, (key, data, _) in enumerate(rows_of(8))]
    assert load(write_tar(tmp_path / "a.tar", rows)).train.class_names == ["7", "--5"]
