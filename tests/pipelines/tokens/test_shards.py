"""Token datasets larger than memory: mapped shards, what is noticed of damage, and training on them.

Covers: pipelines/commands/verify.py, pipelines/tokens/meta.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import files_in
from givens.token_datasets import make_dataset, refused
from hypothesis import given, settings
from hypothesis import strategies as st
from launch import output_of, start
from safetensors.torch import load_file, save_file
from small import make_prior, make_tokenizer

from pipelines import train_prior
from pipelines.commands.verify import VerifyConfig
from pipelines.commands.verify import run as verify
from pipelines.shuffling import uniforms
from pipelines.tokens import TokenSplit, load_tokens, shards
from pipelines.tokens import dataset as tokens
from pipelines.tokens.meta import META
from pipelines.train_prior import PriorTask, TrainPriorConfig, perturbed
from tokenizer.files import FormatError, IntegrityError, PathError, PipelineLoadError, write_manifest

# Shards


@pytest.fixture
def sharded(tmp_path):
    """A dataset of 50 training rows in files of 7, and what it was made of."""
    data = make_dataset(rows=50)
    data.save(tmp_path / "tokens", rows_per_shard=7)
    return tmp_path / "tokens", data


def test_files_of_a_large_split(sharded):
    folder, data = sharded
    assert [name for name in files_in(folder) if name.startswith("train")] == [
        f"train-{k:05d}-of-00008.safetensors" for k in range(8)
    ]
    parts = [load_file(folder / f"train-{k:05d}-of-00008.safetensors") for k in range(8)]
    assert torch.equal(torch.cat([part["tokens"] for part in parts]), data.splits["train"].tokens)
    assert [len(part["labels"]) for part in parts] == [7] * 7 + [1]


@pytest.mark.parametrize("size", [1, 7, 50, 1000, None])
@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("labelled", [True, False])
def test_rows_are_the_same_however_they_are_kept(tmp_path, size, mapped, labelled):
    data = make_dataset(rows=50, labelled=labelled)
    data.save(tmp_path / "tokens", rows_per_shard=size)
    split, whole = load_tokens(tmp_path / "tokens", mapped=mapped).splits["train"], data.splits["train"].tokens.long()
    assert isinstance(split.tokens, torch.Tensor) != mapped and len(split) == 50
    generator = np.random.default_rng(0)
    for count in (0, 1, 200):
        rows = generator.integers(0, 50, count)
        for asked in (rows, torch.from_numpy(rows)):
            found = split.rows(asked)
            assert found.dtype == torch.int64 and torch.equal(found, whole[torch.from_numpy(rows)])
    for rows in (slice(None), slice(5, 23), slice(48, 90), slice(9, 9), slice(3, 40, 5)):
        assert torch.equal(split.rows(rows), whole[rows]) and torch.equal(split.tokens[rows].long(), whole[rows])
    every_third = np.arange(50) % 3 == 0
    for asked, meant in (
        ([], whole[:0]),
        ([-1, 0], whole[[49, 0]]),
        (3, whole[3:4]),
        (slice(None, None, -7), whole.flip(0)[::7]),
        (every_third, whole[torch.from_numpy(every_third)]),
    ):
        assert torch.equal(split.rows(asked), meant)
    for wrong in (np.array([3, 50]), [-51], [0.5], every_third[1:]):
        with pytest.raises(IndexError, match="50"):
            split.rows(wrong)
    assert split.labels is None if not labelled else torch.equal(split.labels, data.splits["train"].labels)


def test_what_is_indexed_like_a_tensor(sharded):
    folder, data = sharded
    rows, whole = load_tokens(folder, mapped=True).splits["train"].tokens, data.splits["train"].tokens
    assert rows.shape == tuple(whole.shape) and rows.dtype == whole.dtype and len(rows) == 50
    for asked in ([-1, 0, -50], torch.arange(50) % 3 == 0, np.arange(50) > 30):
        assert torch.equal(rows[asked], whole[asked])
    for wrong in ([50], [-51], [0.5], torch.arange(9) > 3):
        with pytest.raises(IndexError, match="50"):
            rows[wrong]


def test_a_mapped_row_costs_its_own_pages(tmp_path):
    """64 MiB are opened; neither that nor reading some rows takes memory of that size."""
    path, grid = tmp_path / "big.safetensors", make_tokenizer("vqvae", (8, 8), 1).grid
    save_file({"tokens": torch.zeros(1 << 24, *grid.shape, dtype=torch.uint8)}, path)

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return sum(int(status.split(name)[1].split()[0]) for name in ("RssAnon:", "RssFile:")) << 10

    if not Path("/proc/self/status").is_file():
        pytest.skip("memory is measured on Linux")
    before = resident()
    tokens_, _ = shards.map_shard(path, 1 << 24, grid)
    rows = shards.MappedRows([tokens_], grid, tmp_path)
    assert rows[[5, 1 << 23, -1]].sum() == 0  # three rows, and what the system reads around them
    assert resident() - before < 16 << 20


def test_a_small_dataset_has_one_file_a_split(tmp_path):
    data = make_dataset()
    data.save(tmp_path / "tokens")
    meta = json.loads((tmp_path / "tokens" / META).read_text())
    assert meta["format_version"] == 1 and meta["splits"] == {"train": [6], "test": [2]}
    for mapped in (True, False):
        loaded = load_tokens(tmp_path / "tokens", mapped=mapped)
        assert torch.equal(loaded.splits["train"].tokens[:], data.splits["train"].tokens)


def test_small_is_in_memory_and_large_is_mapped(sharded, monkeypatch):
    assert isinstance(load_tokens(sharded[0]).splits["train"].tokens, torch.Tensor)
    monkeypatch.setattr(tokens, "IN_MEMORY", 200)  # 52 rows of 4 bytes
    assert isinstance(load_tokens(sharded[0]).splits["train"].tokens, shards.MappedRows)


ROWS = st.dictionaries(st.sampled_from(["train", "validation", "test"]), st.integers(0, 1 << 31), min_size=1)


@settings(deadline=None, max_examples=100)
@given(ROWS, st.one_of(st.none(), st.integers(1, 1 << 22)))
def test_every_row_is_in_one_file_whatever_the_size(rows, rows_per_shard):
    try:
        found = shards.cut_shards(rows, rows_per_shard)
    except ValueError:
        assert rows_per_shard and sum(max(1, -(-n // rows_per_shard)) for n in rows.values()) > shards.MAX_SHARDS
        return
    assert list(found) == list(rows) and sum(map(len, found.values())) <= shards.MAX_SHARDS
    for split, sizes in found.items():
        assert sum(sizes) == rows[split] and all(size == sizes[0] for size in sizes[:-1])
        assert sizes[-1] <= sizes[0] <= (rows_per_shard or 1 << 31) and (all(sizes) or sizes == [0])
        assert len(set(shards.shard_names(split, len(sizes)))) == len(sizes)
        if rows_per_shard is None and len(sizes) > 1:
            assert sizes[0] % 256 == 0 and sizes[0] >= 1024
            assert sizes[0] <= 4096 or sum(rows.values()) > 4000 * 4096
            assert len(sizes) <= 16 or sizes[0] >= 3840


@pytest.mark.parametrize(
    ("rows", "files"), [(0, 1), (1, 1), (2047, 1), (2048, 2), (16384, 16), (65536, 16), (65537, 17), (1281167, 313)]
)
def test_the_number_of_files_of_a_split(rows, files):
    assert len(shards.cut_shards({"train": rows}, None)["train"]) == files


def test_more_files_than_a_manifest_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_SHARDS", 9)
    with pytest.raises(ValueError, match=r"rows_per_shard: makes 52 files, at most 9"):
        make_dataset(rows=50).save(tmp_path / "tokens", rows_per_shard=1)
    assert not (tmp_path / "tokens").exists()


def test_ids_are_checked_when_they_are_written(tmp_path):
    data = make_dataset()
    data.splits["train"].tokens[3, 0, 1] = 32
    with pytest.raises(ValueError, match=r"\[0, 32\)"):
        data.save(tmp_path / "tokens")
    assert not list(tmp_path.iterdir())


# Damage


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_a_truncated_file_is_an_error_and_no_signal(sharded, mapped, keep):
    """Even where the manifest says that this is its size, and nothing is hashed."""
    path = sharded[0] / "train-00003-of-00008.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    for seal in (False, True):
        if seal:
            write_manifest(sharded[0])
        with pytest.raises((FormatError, IntegrityError), match=path.name):
            load_tokens(sharded[0], mapped=mapped, verify=False)


def test_what_is_noticed_without_hashing(sharded):
    """A large dataset's files are compared by size, what is small by hash, and ids as they are read."""
    folder, _ = sharded
    path = folder / "train-00002-of-00008.safetensors"
    good = path.read_bytes()
    position = len(good) - 2  # an id of its last row
    path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
    assert len(load_tokens(folder, verify=False, mapped=True).splits["train"]) == 50
    assert refused(folder, IntegrityError, path.name, seal=False)
    with pytest.raises(IntegrityError, match=path.name):
        verify(VerifyConfig(folder=str(folder)))
    path.write_bytes(good)
    assert verify(VerifyConfig(folder=str(folder))) == folder
    path.write_bytes(good[:position] + b"\xff" + good[position + 1 :])
    split = load_tokens(folder, verify=False, mapped=True).splits["train"]
    assert len(split.rows([0, 49]))
    for rows in (np.array([0, 20]), slice(None)):
        with pytest.raises(IntegrityError, match=r"an id of 255.*\[0, 32\)"):
            split.rows(rows)
    write_manifest(folder)
    with pytest.raises(IntegrityError, match="an id of 255"):
        verify(VerifyConfig(folder=str(folder)))
    path.write_bytes(good + b"\0")
    with pytest.raises(IntegrityError, match="bytes, manifest.json says"):
        load_tokens(folder, verify=False)
    path.unlink()
    with pytest.raises(PathError, match=path.name):
        load_tokens(folder, verify=False)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [(META, b"here", b"hero"), ("tokenizer/config.json", b"1", b"2"), ("tokenizer/model.safetensors", b"F32", b"I32")],
)
def test_what_is_small_is_always_hashed(sharded, name, old, new):
    path = sharded[0] / name
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(IntegrityError, match="sha256"):
        load_tokens(sharded[0], verify=False)


@pytest.mark.parametrize(
    ("splits", "needle"),
    [
        ({"train": [7] * 7 + [2], "test": [2]}, "should hold 2 rows"),
        ({"train": [7] * 9, "test": [2]}, "manifest.json does not list it"),
        ({"train": [], "test": [2]}, META),
        ({"train": [7, -1], "test": [2]}, META),
        ({"train": [7, True], "test": [2]}, META),
        ({"train": [7.0], "test": [2]}, META),
    ],
)
def test_wrong_rows_of_files(sharded, splits, needle):
    meta = json.loads((sharded[0] / META).read_text())
    (sharded[0] / META).write_text(json.dumps({**meta, "splits": splits}))
    assert refused(sharded[0], PipelineLoadError, needle)


def test_a_file_without_labels_among_those_with_them(tmp_path):
    data = make_dataset(rows=10, labelled=False)
    data.save(tmp_path / "tokens", rows_per_shard=5)
    path = tmp_path / "tokens" / "train-00000-of-00002.safetensors"
    save_file({**load_file(path), "labels": torch.zeros(5, dtype=torch.int64)}, path)
    assert refused(tmp_path / "tokens", IntegrityError, "labels")


def test_a_reader_keeps_what_it_mapped(sharded):
    """The dataset is replaced under it, as encode does."""
    folder, data = sharded
    split = load_tokens(folder, mapped=True).splits["train"]
    make_dataset(rows=9, seed=1).save(folder)
    assert torch.equal(split.tokens[:], data.splits["train"].tokens)


# Training on it


def test_batches_are_the_same_from_memory_and_from_disk(sharded, monkeypatch):
    folder, _ = sharded
    model = {"kind": "gpt", "dim": 16, "depth": 1, "heads": 1}
    found = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(tokens, "IN_MEMORY", limit)
        task = PriorTask(TrainPriorConfig(out="", tokens=str(folder), model=model, perturb=0.3, label_dropout=0.5))
        assert isinstance(task.train_split.tokens, torch.Tensor) == bool(limit)
        found.append([task.batch(*task.samples(16, 3, step), 3) for step in range(9)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert len({tuple(labels.tolist()) for _, labels in found[0]}) == 9


def test_blocks_are_an_order_of_the_same_rows(tmp_path):
    make_dataset(rows=1000).save(tmp_path / "tokens")
    model = {"kind": "marginal"}
    task = PriorTask(TrainPriorConfig(out="", tokens=str(tmp_path / "tokens"), model=model, blocks=16))
    parts = [task.samples(64, 0, step) for step in range(32)]
    indices, epochs = (np.concatenate(side) for side in zip(*parts, strict=True))
    for epoch in (0, 1):
        assert np.array_equal(np.sort(indices[epochs == epoch]), np.arange(1000))
    assert len(np.unique(indices[:256] // 16)) == 16 and (indices[:1000] != indices[1000:2000]).any()


def test_a_prior_that_counts_reads_what_is_on_the_disk(sharded, monkeypatch):
    monkeypatch.setattr("prior.marginal.CHUNK", 16)
    folder, data = sharded
    split, whole = load_tokens(folder, mapped=True).splits["train"], data.splits["train"]
    ids, labels = whole.tokens.flatten(1).long(), whole.labels
    model = make_prior("marginal", data.grid.shape, data.grid.vocab_size)
    for some in (labels, None):
        model.initialize(split.tokens, some)
        for label in range(4):
            mine = ids if label == 3 or some is None else ids[labels == label]
            counts = torch.nn.functional.one_hot(mine, 32).sum(0)
            assert torch.allclose(model.table[label], ((counts + 1) / (len(mine) + 32)).log())


def test_perturbed_cells_are_drawn_as_they_always_were():
    """Column 1 of a cell's draws says whether, column 2 says by what."""
    ids, indices = torch.randint(50, (40, 9, 60)), np.random.default_rng(0).integers(0, 1000, 40)
    epochs, size = np.arange(40) // 25, 540
    found = perturbed(ids, indices, epochs, 3, 0.3, 50).flatten(1)
    for row in range(40):
        draws = uniforms(3, int(epochs[row]), indices[row] * size + np.arange(size))
        expected = torch.where(
            torch.from_numpy(draws[:, 1] < 0.3), torch.from_numpy(draws[:, 2] * 50).long(), ids[row].flatten()
        )
        assert torch.equal(found[row], expected)
    assert np.array_equal(uniforms(3, 1, indices, columns=(4, 0)), uniforms(3, 1, indices)[:, [4, 0]])


def test_training_says_what_can_not_be_found(tmp_path):
    for name in (str(tmp_path / "nowhere"), "nobody/nothing"):
        with pytest.raises(PathError, match="make .* with `smalti encode`"):
            train_prior.run(TrainPriorConfig(out=str(tmp_path / "run"), tokens=name))
    assert not (tmp_path / "run").exists()


# A split, and what a dataset costs


def test_a_split_is_what_it_was():
    """Callers that make one of tensors alone."""
    split = TokenSplit(torch.arange(12).reshape(3, 2, 2), None)
    assert len(split) == 3 and torch.equal(split.rows([2, 0]), torch.arange(12).reshape(3, 2, 2)[[2, 0]])
    assert torch.equal(split.rows(slice(1, 3)), split.tokens[1:])


@pytest.mark.slow
def test_the_benchmark_measures_every_case(tmp_path):
    command = [sys.executable, "-m", "benchmarks.speed.token_data", f"out={tmp_path / 'tokens'}"]
    printed = output_of(start([*command, "rows=70000", "times=20"]))
    assert printed.count("\n| ") == 5 and "order of 1,400,000 rows" in printed
