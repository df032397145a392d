"""Token datasets on the Hub: what is pushed comes back, `datasets` reads it too, and nothing else is fetched.

As in test_hub.py everything by Hub id happens in one process of its own, `client` at the end of this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from givens.token_datasets import make_dataset
from servers.fake_hub import run_client, serve

from pipelines.commands.push import PushConfig
from pipelines.commands.push import run as push
from pipelines.config import UserError
from pipelines.config.command import parse
from pipelines.tokens import TokenDataset, TokenSplit, load_tokens, parquet
from pipelines.tokens.meta import META
from tokenizer.files import FormatError, IntegrityError, LimitError, PathError, PipelineLoadError, write_manifest

SECRET = "hf_open_sesame"


def assert_same(found: TokenDataset, data: TokenDataset) -> None:
    """Bit for bit, and with everything that is not a row."""
    assert found.grid == data.grid and found.class_names == data.class_names and found.source == data.source
    assert found.augmentations == data.augmentations and found.parts == data.parts
    assert found.tokenizer.fingerprint() == data.tokenizer.fingerprint() and list(found.splits) == list(data.splits)
    for name, split in data.splits.items():
        assert torch.equal(found.splits[name].tokens[:], split.tokens[:])
        assert (
            split.labels is None
            if found.splits[name].labels is None
            else torch.equal(found.splits[name].labels, split.labels)
        )


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A dataset as parquet in several files, and what it is of."""
    monkeypatch.setattr(parquet, "FILE_BYTES", 100)  # 25 rows
    data = make_dataset(rows=60)
    data.to_parquet(tmp_path / "parquet")
    return tmp_path / "parquet", data


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("levels", [(5, 4, 3), (48, 48, 48)])
@pytest.mark.parametrize("file_bytes", [100, 1 << 20])
def test_what_is_written_is_what_is_read(tmp_path, monkeypatch, labelled, levels, file_bytes):
    """For ids of one, two and four bytes, in one parquet file and in many."""
    monkeypatch.setattr(parquet, "FILE_BYTES", file_bytes)
    data = make_dataset(labelled=labelled, rows=40, quantizer={"kind": "fsq", "levels": levels})
    data.splits["train"].tokens[0] = torch.tensor(data.grid.vocab_size - 1)
    data.parts.append({"data": {}, "seed": 3, "variants": {"train": 1}, "rows": {"train": 40}})
    data.to_parquet(tmp_path / "parquet")
    assert_same(load_tokens(tmp_path / "parquet", cache_dir=tmp_path / "cache"), data)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_split_of_no_rows_comes_back(tmp_path, labelled):
    """As `filter` may leave one."""
    data = make_dataset(labelled=labelled, rows=0)
    data.to_parquet(tmp_path / "parquet")
    assert_same(load_tokens(tmp_path / "parquet", cache_dir=tmp_path / "cache"), data)


def test_rows_of_a_mapped_dataset_are_written_some_at_a_time(tmp_path, monkeypatch):
    data = make_dataset(rows=40)
    data.save(tmp_path / "tokens", rows_per_shard=9)
    load_tokens(tmp_path / "tokens", mapped=True).to_parquet(tmp_path / "parquet")
    monkeypatch.setattr(parquet, "ROWS_PER_SHARD", 7)  # read in other portions than written
    assert_same(load_tokens(tmp_path / "parquet", cache_dir=tmp_path / "cache"), data)


def test_plain_datasets_reads_it(exported, tmp_path):
    """With the network off (conftest), from the folder that would be uploaded."""
    datasets = pytest.importorskip("datasets")
    folder, data = exported
    found = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "datasets"))
    assert {name: len(split) for name, split in found.items()} == {"train": 60, "test": 2}
    assert found["train"].features["label"].names == ["cat", "dog", "eel"]
    assert found["train"].features["tokens"] == datasets.List(datasets.Value("uint8"), length=4)
    rows = found["train"].with_format("torch")[:]
    assert torch.equal(rows["tokens"].long(), data.splits["train"].tokens.flatten(1).long())
    assert torch.equal(rows["label"], data.splits["train"].labels)


def test_it_is_unpacked_once(exported, tmp_path, monkeypatch):
    folder, data = exported
    load_tokens(folder, cache_dir=tmp_path / "cache")
    monkeypatch.setattr(parquet, "unpack", lambda *given: pytest.fail("unpacked again"))
    assert_same(load_tokens(folder, cache_dir=tmp_path / "cache"), data)
    monkeypatch.undo()
    other = make_dataset(rows=8, seed=1)
    other.to_parquet(folder)  # other content is not taken for it
    assert_same(load_tokens(folder, cache_dir=tmp_path / "cache"), other)


def rewrite(folder: Path, change: Any, name: str = "train-00001-of-00003") -> None:
    """Change the table of one parquet file, and sign it again."""
    import pyarrow.parquet as pq

    path = folder / "data" / f"{name}.parquet"
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    write_manifest(folder)


def ids(table: Any, values: Any) -> Any:
    """The table with other tokens."""
    return table.set_column(0, "tokens", values)


def test_damaged_and_foreign_parquet(exported, tmp_path):
    import pyarrow as pa

    folder, _ = exported
    good, count = tmp_path / "good", 0
    shutil.copytree(folder, good)

    def lists(values: Any, kind: Any, length: int = 4) -> Any:
        return pa.FixedSizeListArray.from_arrays(pa.array(values, kind), length)

    cases = [
        (lambda t: t.slice(1), FormatError, "not the 60 rows"),
        (lambda t: pa.concat_tables([t, t]), FormatError, "not the 60 rows"),
        (lambda t: t.drop_columns(["label"]), FormatError, "train-00001"),
        (lambda t: t.drop_columns(["tokens"]), FormatError, "train-00001"),
        (lambda t: ids(t, lists([32] * 100, pa.uint8())), IntegrityError, "[0, 32)"),
        (lambda t: ids(t, lists([-1] * 100, pa.int16())), IntegrityError, "[0, 32)"),
        (lambda t: ids(t, lists([0.5] * 100, pa.float32())), PipelineLoadError, "train"),
        (lambda t: ids(t, lists([None] * 100, pa.uint8())), FormatError, "missing"),
        (lambda t: ids(t, lists([1] * 75, pa.uint8(), 3)), FormatError, "lists of 4 ids"),
        (lambda t: ids(t, pa.array([["a"] * 4] * 25)), FormatError, "lists of 4 ids"),
        (lambda t: t.set_column(1, "label", pa.array([3] * 25)), IntegrityError, "[0, 3)"),
        (lambda t: t.set_column(1, "label", pa.array([None] * 25, pa.int64())), FormatError, "missing"),
        (lambda t: t.set_column(1, "label", pa.array(["cat"] * 25)), FormatError, "train-00001"),
    ]
    for change, error, needle in cases:
        shutil.rmtree(folder)
        shutil.copytree(good, folder)
        rewrite(folder, change)
        with pytest.raises(error, match=needle.replace("[", r"\[").replace(")", r"\)")):
            load_tokens(folder, cache_dir=tmp_path / "cache")
        count += not list((tmp_path / "cache" / "smalti-tokens").glob("*/*"))
    assert count == len(cases)  # nothing half unpacked was left
    (folder / "data" / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(IntegrityError, match="test-00000"):
        load_tokens(folder, cache_dir=tmp_path / "cache")


def test_the_verb_writes_what_it_would_upload(exported, tmp_path, capsys):
    folder, data = exported
    data.save(tmp_path / "tokens")
    push(PushConfig(folder=str(tmp_path / "tokens"), out=str(tmp_path / "out")))
    assert sorted(p.name for p in (tmp_path / "out" / "data").iterdir()) == sorted(
        p.name for p in (folder / "data").iterdir()
    )
    assert_same(load_tokens(tmp_path / "out", cache_dir=tmp_path / "cache"), data)
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "needle"),
    [
        (["folder=x"], "to, out: give one of the two"),
        (["folder=x", "to=a/b", "out=y"], "to, out: give one of the two"),
        (["folder=x", "to=me"], "to"),
        (["folder=x", "to=../me/it"], "to"),
    ],
)
def test_commands_that_go_nowhere(argv, needle):
    with pytest.raises(UserError, match=needle):
        parse(PushConfig, argv, verb="push", description=None)


def test_folders_that_are_nothing_of_ours(tmp_path):
    with pytest.raises(UserError, match="neither a pipeline .* nor a token dataset"):
        push(PushConfig(folder=str(tmp_path), to="me/it"))
    make_dataset().save(tmp_path / "tokens")
    with pytest.raises(UserError, match="to: me/it cannot be written to: HF_HUB_OFFLINE"):  # the network is off
        push(PushConfig(folder=str(tmp_path / "tokens"), to="me/it"))
    with pytest.raises(PathError, match="cannot be fetched"):
        load_tokens("me/it", cache_dir=tmp_path / "cache")


def test_a_split_that_datasets_would_not_take(tmp_path):
    data = make_dataset()
    splits = {**data.splits, "held-out": TokenSplit(data.splits["test"].tokens, data.splits["test"].labels)}
    with pytest.raises(UserError, match="held-out"):
        TokenDataset(data.grid, data.class_names, splits, data.tokenizer, {}).to_parquet(tmp_path / "parquet")


# By Hub id


def digest_of(data: TokenDataset) -> str:
    """Of all rows, labels and what belongs to them."""
    state = hashlib.sha256(f"{data.grid} {data.class_names} {data.source} {data.tokenizer.fingerprint()}".encode())
    for name, split in data.splits.items():
        state.update(name.encode() + split.tokens[:].long().numpy().tobytes() + split.labels.numpy().tobytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What `client` found, what the Hub was asked, and what it has now."""
    root, cache = tmp_path_factory.mktemp("hub"), tmp_path_factory.mktemp("cache")
    with serve(root, secret=SECRET) as hub:
        found = run_client(__file__, hub, cache / "home", str(cache), token=SECRET)
    return {
        **found,
        "requests": hub.requests,
        "root": root,
        "created": hub.created,
    }


def test_what_is_pushed_comes_back(report):
    assert report["first"] == report["first here"] and report["fingerprint"] == report["fingerprint here"]


def test_a_later_push_replaces_all_of_it_and_a_revision_pins_the_earlier(report):
    """Whose rows were in more parquet files."""
    assert report["second"] == report["second here"] != report["first"]
    assert report["pinned"] == report["commit"] == report["first here"]
    main = report["root"] / "datasets" / "me" / "tokens" / "main"
    assert sorted(path.name for path in (main / "data").iterdir()) == [
        "test-00000-of-00001.parquet",
        "train-00000-of-00001.parquet",
    ]


def test_training_takes_it_by_its_id(report):
    assert report["task"] == 8 and report["task pinned"] == 60


def test_the_verb_says_where_it_is(report):
    assert report["address"].endswith("/datasets/me/other") and report["by the verb"] == report["second here"]
    private = [made.get("visibility") == "private" or bool(made.get("private")) for made in report["created"]]
    assert private == [False, False, False, True]


def test_nothing_else_is_fetched(report):
    fetched = {path.split("/resolve/")[1].split("/", 1)[1] for path, _ in report["requests"] if "/resolve/" in path}
    assert "pytorch_model.bin" not in fetched and "data/script.py" not in fetched
    assert {META, "manifest.json", "tokenizer/model.safetensors"} <= fetched


def test_without_the_network_it_is_in_the_cache(report):
    assert report["again"] == report["second here"]
    assert "cannot be fetched" in report["unknown"]


def client(cache: str) -> None:
    """Push and load, and print what came of it."""
    from pipelines.train_prior import PriorTask, TrainPriorConfig

    parquet.FILE_BYTES = 100
    one, two = make_dataset(rows=60), make_dataset(rows=8, seed=1)
    found: dict[str, Any] = {"first here": digest_of(one), "second here": digest_of(two)}
    found["fingerprint here"] = one.tokenizer.fingerprint()
    options = {"cache_dir": Path(cache) / "ours"}
    one.push_to_hub("me/tokens", revision="v1")
    pushed = one.push_to_hub("me/tokens")
    first = load_tokens("me/tokens", **options)
    found |= {"first": digest_of(first), "fingerprint": first.tokenizer.fingerprint()}
    two.push_to_hub("me/tokens")
    found["second"] = digest_of(load_tokens("me/tokens", **options))
    found["pinned"] = digest_of(load_tokens("me/tokens", revision="v1", **options))
    found["commit"] = digest_of(load_tokens("me/tokens", revision=pushed.oid, local_files_only=True, **options))
    model = {"kind": "marginal"}
    found["task"] = PriorTask(TrainPriorConfig(out="", tokens="me/tokens", model=model)).rows
    found["task pinned"] = PriorTask(TrainPriorConfig(out="", tokens="me/tokens", revision="v1", model=model)).rows
    two.save(Path(cache) / "tokens")
    found["address"] = push(PushConfig(folder=str(Path(cache) / "tokens"), to="me/other"))
    found["by the verb"] = digest_of(load_tokens("me/other", **options))
    found["again"] = digest_of(load_tokens("me/other", local_files_only=True, **options))
    try:
        load_tokens("nobody/nothing", **options)
    except PathError as error:
        found["unknown"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    client(*sys.argv[1:])


def test_a_manifest_without_end_is_refused_before_it_is_read(exported, tmp_path):
    folder = Path(shutil.copytree(exported[0], tmp_path / "large"))
    os.truncate(folder / "manifest.json", 1 << 40)
    with pytest.raises(LimitError, match=r"manifest\.json: 1099511627776 bytes"):
        load_tokens(folder, cache_dir=tmp_path / "cache")
