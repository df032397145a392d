"""What is counted of a codebook while it is trained, on one process or several, and how far apart its codes lie."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import fork_twice, join_group, leave_group
from safetensors.torch import load_file, save_file
from small import make_tokenizer

from pipelines.metrics import codebook
from pipelines.metrics.codebook import CodebookUse, code_distances, count_tokens, nearest_other


def random_batches(vocab, levels, count=40, seed=0):
    """Tokens (4, levels * 3, 5): ids above a limit that falls from batch to batch do not occur."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.linspace(vocab, max(1, vocab // 3), count).long().tolist()
    return [torch.randint(limit, (4, levels * 3, 5), generator=generator) for limit in limits]


# Counts


@pytest.mark.parametrize("levels", [1, 3])
def test_counts_are_those_of_a_loop(levels):
    vocab, use = 24, CodebookUse(24, (15,) * levels)
    uses = [[1.0] * vocab for _ in range(levels)]
    for tokens in random_batches(vocab, levels):
        found = use.count(tokens)
        uses, total = [[count * 0.99 for count in level] for level in uses], [0] * vocab
        for level in range(levels):
            for id in tokens[:, 3 * level : 3 * level + 3].flatten().tolist():
                uses[level][id] += 1
                total[id] += 1
        assert found.sum(0).tolist() == total and found.dtype == torch.int64
    assert torch.allclose(use.uses, torch.tensor(uses), rtol=1e-5)


def test_a_code_is_dead_once_it_is_used_less_than_a_20th_of_the_mean():
    """No code is before the first batch, nor a common one after a few without it."""
    use = CodebookUse(64, (32,))
    assert not use.dead().any()
    for step in range(400):
        use.count((1 + (torch.arange(32) + 32 * step) % 63).reshape(1, 4, 8))  # all but code 0
        mean = float(use.uses.mean())
        expected = [0] if 0.99 ** (step + 1) < 0.05 * mean else []
        assert use.dead()[0].nonzero().flatten().tolist() == expected and (step > 3 or not expected)
    assert expected == [0]
    use.count(torch.zeros(1, 4, 8, dtype=torch.long))
    assert not use.dead().any()


def test_a_saved_state_continues_as_if_it_had_not_been(tmp_path):
    batches, whole, first, second = random_batches(24, 2), *(CodebookUse(24, (15, 15)) for _ in range(3))
    for number, tokens in enumerate(batches):
        whole.count(tokens)
        (first if number < 17 else second).count(tokens)
        if number == 16:
            save_file(first.state_dict(), tmp_path / "use.safetensors")
            second.load_state_dict(load_file(tmp_path / "use.safetensors"))
    assert torch.equal(second.uses, whole.uses)


def one_of_two(folder: Path) -> None:
    """Half of the images of each batch."""
    rank, use = join_group(folder), CodebookUse(24, (15, 15))
    assert dist.get_world_size() == 2
    totals = [use.count(tokens) for tokens in load_file(folder / "batches.safetensors")["tokens"].chunk(2, 1)[rank]]
    save_file({"uses": use.uses, "totals": torch.stack(totals)}, folder / f"{rank}.safetensors")
    leave_group()


def test_two_processes_count_what_one_does(tmp_path):
    batches = random_batches(24, 2)
    save_file({"tokens": torch.stack(batches)}, tmp_path / "batches.safetensors")
    fork_twice(__file__, tmp_path)
    use = CodebookUse(24, (15, 15))
    totals = torch.stack([use.count(tokens) for tokens in batches])
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(found["totals"], totals) and torch.equal(found["uses"], use.uses)


def test_levels_are_blocks_of_rows():
    tokens = torch.tensor([[[0, 1], [0, 0], [2, 2], [2, 1]]])
    assert count_tokens(tokens, (4, 4), 3).tolist() == [[3, 1, 0], [0, 1, 3]]
    assert count_tokens(tokens.flatten(1), (8,), 3).tolist() == [[3, 2, 3]]


# Distances


@pytest.mark.parametrize(("count", "most"), [(2, 1 << 24), (300, 1 << 24), (1000, 1 << 17)])
def test_the_nearest_other_code_is_that_of_a_full_search(monkeypatch, count, most):
    """Of evenly spaced codes where there are many."""
    monkeypatch.setattr(codebook, "DISTANCES", most)
    codes = torch.randn(count, 4)
    every = torch.cdist(codes.double(), codes.double()).fill_diagonal_(math.inf).min(1).values
    found = nearest_other(codes).double()
    assert len(found) == min(count, most // count)
    assert torch.allclose(found, every[torch.linspace(0, count - 1, len(found)).long()], atol=1e-5)


def test_codes_that_nearly_coincide_far_from_zero_are_told_apart():
    codes = torch.tensor([[1000.3, 0.0], [1000.3, 0.01], [-1000.3, 3.0], [-1000.3, 3.02]])
    assert nearest_other(codes).tolist() == pytest.approx([0.01, 0.01, 0.02, 0.02], rel=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_are_measured_to_their_own_code(normalize):
    model = make_tokenizer("vqvae", quantizer={"kind": "vq", "codes": 16, "dim": 4, "normalize": normalize}).eval()
    torch.nn.init.normal_(model.quantizer.codebook)
    images = torch.rand(5, 3, 12, 8) * 2 - 1
    found = code_distances(model, images)
    with torch.no_grad():
        vectors = model.encoder(images).movedim(1, -1).flatten(0, 2)
        codes = model.quantizer.lookup(model.encode(images)).movedim(1, -1).flatten(0, 2)
        vectors = torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors
    assert np.allclose(found["vector to its code"], (vectors - codes).norm(dim=1), atol=1e-5)
    assert found["code to nearest code"].shape == (16,)


def test_a_picture_does_not_move_the_codebook_of_a_model_in_training():
    model = make_tokenizer("vqvae").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(code_distances(model, torch.rand(5, 3, 12, 8))) == ["code to nearest code"]
    picture = CodebookUse(32, (6,)).picture(model, torch.rand(5, 3, 12, 8))
    assert picture.dtype == np.uint8 and picture.ndim == 3
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["fsq", "lfq", "rvq"])
def test_without_one_learned_codebook_there_are_no_distances(kind):
    model = make_tokenizer("vqvae", quantizer={"kind": kind}).eval()
    assert code_distances(model, torch.rand(2, 3, 12, 8)) == {}
    assert code_distances(make_tokenizer("pixels"), torch.rand(2, 3, 12, 8)) == {}


@pytest.mark.parametrize(("vocab", "levels", "steps"), [(2, 1, 0), (3, 64, 2), (1 << 18, 1, 2)])
def test_a_picture_of_any_codebook(vocab, levels, steps):
    use, model = CodebookUse(vocab, (6,) * levels), make_tokenizer("pixels")
    model.levels = levels
    for _ in range(steps):
        use.count(torch.randint(vocab, (2, levels * 2, 3)))
    assert use.picture(model, torch.empty(0)).min() < 60


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
