"""The classes of images: valid labels and names."""

import os

import pytest
from givens.images import config, load, rows_of, write_folder, write_parquet, write_tar

from pipelines.config import UserError
from pipelines.images import load_images
from pipelines.saving import check_texts
from pipelines.tokens.meta import check_printable
from prior.columns import LABEL, ClassColumn


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", os.fsdecode(b"caf\xe9")])
def test_a_folder_with_an_invalid_class_name_is_refused(tmp_path, name):
    """When images are loaded, not hours later when a pipeline is saved."""
    write_folder(tmp_path, classes=("cat", name), count=3)
    with pytest.raises(UserError, match=r"(?s)class name.*data\.label_column=null") as caught:
        load_images(config(tmp_path))
    assert str(caught.value).isprintable()
    assert load_images(config(tmp_path, label_column=None)).train.labels is None


@pytest.mark.parametrize("pair", [("Cat", "cat"), ("cat", "cat "), ("caf\u00e9", "cafe\u0301")])
@pytest.mark.parametrize("apart", [False, True])
def test_one_class_in_two_spellings_is_refused(tmp_path, pair, apart):
    """In one split, and in two."""
    for split, name in zip(("train", "test") if apart else (".", "."), pair, strict=True):
        write_folder(tmp_path / split, count=3, classes=(name, "dog"))
    with pytest.raises(UserError, match="two spellings"):
        load_images(config(tmp_path))
    assert load_images(config(tmp_path, label_column=None)).train.labels is None


@pytest.mark.parametrize("name", ["\U0001f469\u200d\U0001f680", "宇宙", "שלום"])
def test_class_names_may_use_any_script_and_joined_emoji(tmp_path, name):
    write_folder(tmp_path, classes=(name, "dog"), count=3)
    assert set(load_images(config(tmp_path)).train.class_names) == {"dog", name}
    check_texts({LABEL: ClassColumn(names=[name])})
    assert check_printable(name) == name


def test_splits_have_the_same_classes(tmp_path):
    """Otherwise label 0 would be a cat here and a dog there."""
    write_parquet(tmp_path / "train-0.parquet", rows_of(6, 2), names=["cat", "dog"])
    write_parquet(tmp_path / "test-0.parquet", rows_of(6, 2), names=["dog", "cat"])
    with pytest.raises(UserError, match=r"^data\.label_column: .*data\.label_column=null"):
        load(tmp_path)
    assert load(tmp_path, label_column=None).held_out.labels is None


def test_a_number_and_the_same_word_are_one_class(tmp_path):
    rows = [(key, data, '{"label": 1}' if k % 2 else '{"label": "1"}') for k, (key, data, _) in enumerate(rows_of(8))]
    train = load(write_tar(tmp_path / "a.tar", rows, label="json")).train
    assert train.class_names == ["1"] and set(train.labels.tolist()) == {0}
