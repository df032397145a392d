"""Token datasets larger than memory: mapped shards, damage, and training on them.

Covers: pipelines/commands/verify.py, pipelines/tokens/meta.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from givens.token_datasets import make_dataset, same_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from small import make_prior

from pipelines.commands.verify import VerifyConfig
from pipelines.commands.verify import run as verify
from pipelines.shuffling import uniforms
from pipelines.tokens import dataset as tokens
from pipelines.tokens import load_tokens, shards
from pipelines.tokens.meta import META
from pipelines.train_prior import PriorTask, TrainPriorConfig, perturb_tokens
from tokenizer.files import FormatError, IntegrityError, write_manifest

# Shards


@pytest.fixture
def sharded(tmp_path):
    """A dataset of 50 training rows in files of 7, and its contents."""
    data = make_dataset(rows=50)
    data.save(tmp_path / "tokens", rows_per_shard=7)
    return tmp_path / "tokens", data


INDICES = st.one_of(
    st.lists(st.integers(-50, 49), max_size=60),
    st.lists(st.integers(-50, 49), max_size=60).map(lambda rows: np.array(rows, np.int64)),
    st.lists(st.integers(-50, 49), max_size=60).map(lambda rows: torch.tensor(rows, dtype=torch.int64)),
    st.lists(st.booleans(), min_size=50, max_size=50).map(np.array),
    st.slices(50),
)


@pytest.mark.parametrize("size", [7, None])
def test_rows_are_indexed_like_those_of_a_tensor(tmp_path, size):
    """In memory and on the disk, in one file and in many."""
    data = make_dataset(rows=50)
    data.save(tmp_path / "tokens", rows_per_shard=size)
    kept, mapped = (load_tokens(tmp_path / "tokens", mapped=mapped).splits["train"] for mapped in (False, True))
    whole = data.splits["train"].tokens
    assert isinstance(kept.tokens, torch.Tensor) and isinstance(mapped.tokens, shards.MappedRows)
    assert mapped.tokens.shape == tuple(whole.shape) and mapped.tokens.dtype == whole.dtype and len(mapped.tokens) == 50

    @settings(max_examples=40, deadline=None)
    @given(INDICES)
    def check(rows):
        index = rows if isinstance(rows, slice) else np.asarray(rows) if len(rows) else slice(0)
        expected = torch.from_numpy(whole.numpy()[index].copy())
        assert torch.equal(mapped.tokens[rows], expected)
        for split in (kept, mapped):
            assert torch.equal(split.rows(rows), expected.long())

    check()
    for split in (kept, mapped):
        for wrong in (np.array([3, 50]), [-51], [0.5], torch.arange(9) > 3):
            with pytest.raises(IndexError, match="50"):
                split.rows(wrong)
        assert same_rows(split.given, data.splits["train"].given)


ROWS = st.dictionaries(st.sampled_from(["train", "validation", "test"]), st.integers(0, 1 << 31), min_size=1)


@settings(deadline=None, max_examples=100)
@given(ROWS, st.one_of(st.none(), st.integers(1, 1 << 22)))
def test_every_row_is_in_one_file(rows, rows_per_shard):
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


# Damage; see also tests/project/test_load_errors.py


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("size", [0, 60, -1])
def test_a_truncated_file_is_an_error_and_not_a_signal(sharded, mapped, size):
    """Even if the manifest lists this size, and nothing is hashed."""
    path = sharded[0] / "train-00003-of-00008.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    write_manifest(sharded[0])
    with pytest.raises(FormatError, match=path.name):
        load_tokens(sharded[0], mapped=mapped, verify=False)


def test_without_hashing_sizes_and_ids_are_checked(sharded):
    """And the small files are hashed nonetheless."""
    folder, _ = sharded
    path = folder / "train-00002-of-00008.safetensors"
    good = path.read_bytes()
    position = len(good) - 2  # an id of its last row
    path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
    assert len(load_tokens(folder, verify=False, mapped=True).splits["train"]) == 50
    with pytest.raises(IntegrityError, match=path.name):
        verify(VerifyConfig(folder=str(folder)))
    path.write_bytes(good)
    assert verify(VerifyConfig(folder=str(folder))) == folder
    path.write_bytes(good[:position] + b"\xff" + good[position + 1 :])
    split = load_tokens(folder, verify=False, mapped=True).splits["train"]
    assert len(split.rows([0, 49]))
    for rows in (np.array([0, 20]), slice(None)):
        with pytest.raises(IntegrityError, match=r"255.*\[0, 32\)"):
            split.rows(rows)
    write_manifest(folder)
    with pytest.raises(IntegrityError, match="255"):
        verify(VerifyConfig(folder=str(folder)))
    path.write_bytes(good + b"\0")
    with pytest.raises(IntegrityError, match="bytes"):
        load_tokens(folder, verify=False)
    path.write_bytes(good)
    (folder / META).write_bytes((folder / META).read_bytes().replace(b"here", b"hero"))
    with pytest.raises(IntegrityError, match="sha256"):
        load_tokens(folder, verify=False)


# Training


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
        assert torch.equal(one[0], other[0]) and same_rows(one[1], other[1])
    assert len({tuple(given.raw("label").tolist()) for _, given in found[0]}) == 9


def test_reading_in_blocks_is_an_order_of_the_same_rows(tmp_path):
    make_dataset(rows=1000).save(tmp_path / "tokens")
    model = {"kind": "marginal"}
    task = PriorTask(TrainPriorConfig(out="", tokens=str(tmp_path / "tokens"), model=model, blocks=16))
    parts = [task.samples(64, 0, step) for step in range(32)]
    indices, epochs = (np.concatenate(side) for side in zip(*parts, strict=True))
    for epoch in (0, 1):
        assert np.array_equal(np.sort(indices[epochs == epoch]), np.arange(1000))
    assert len(np.unique(indices[:256] // 16)) == 16 and (indices[:1000] != indices[1000:2000]).any()


def test_a_prior_that_counts_reads_rows_from_the_disk(sharded, monkeypatch):
    monkeypatch.setattr("prior.marginal.CHUNK", 16)
    folder, data = sharded
    split, whole = load_tokens(folder, mapped=True).splits["train"], data.splits["train"]
    ids, labels = whole.tokens.flatten(1).long(), whole.given.raw("label")
    model = make_prior("marginal", data.grid.shape, data.grid.vocab_size)
    for some in (whole.given, whole.given.without()):
        model.initialize(split.tokens, some)
        for label in range(4):
            mine = ids if label == 3 or not some.names else ids[labels == label]
            counts = torch.nn.functional.one_hot(mine, 32).sum(0)
            assert torch.allclose(model.table[label], ((counts + 1) / (len(mine) + 32)).log())


def test_perturbed_cells_depend_on_their_draws_alone():
    """Column 1 of a cell's draws decides whether it is replaced, column 2 by which id."""
    ids, indices = torch.randint(50, (40, 9, 60)), np.random.default_rng(0).integers(0, 1000, 40)
    epochs, size = np.arange(40) // 25, 540
    found = perturb_tokens(ids, indices, epochs, 3, 0.3, 50).flatten(1)
    for row in range(40):
        draws = uniforms(3, int(epochs[row]), indices[row] * size + np.arange(size))
        expected = torch.where(
            torch.from_numpy(draws[:, 1] < 0.3), torch.from_numpy(draws[:, 2] * 50).long(), ids[row].flatten()
        )
        assert torch.equal(found[row], expected)
    assert np.array_equal(uniforms(3, 1, indices, columns=(4, 0)), uniforms(3, 1, indices)[:, [4, 0]])
