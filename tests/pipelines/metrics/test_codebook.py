"""What is counted of a codebook while it is trained, on one process or several, and the picture of it."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small import make_tokenizer
from two_processes import fork_twice, join_group, leave_group

from pipelines.metrics import charts, codebook
from pipelines.metrics.codebook import CodebookUse, code_distances, count_tokens, nearest_other


def random_batches(vocab, levels, count=40, seed=0):
    """Tokens (4, levels * 3, 5): ids above a limit that falls from batch to batch do not occur."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.linspace(vocab, max(1, vocab // 3), count).long().tolist()
    return [torch.randint(limit, (4, levels * 3, 5), generator=generator) for limit in limits]


def count(use, tokens):
    """A batch."""
    return use.count(tokens)


def observed(vocab, levels, batches):
    use = CodebookUse(vocab, (15,) * levels)
    for tokens in batches:
        count(use, tokens)
    return use


# Counts and ages


@pytest.mark.parametrize("levels", [1, 3])
def test_counts_and_ages_are_those_of_a_loop(levels):
    vocab, use = 24, CodebookUse(24, (15,) * levels)
    uses = [[0.0] * vocab for _ in range(levels)]
    last = [[0] * vocab for _ in range(levels)]
    for step, tokens in enumerate(random_batches(vocab, levels), 1):
        found = count(use, tokens)
        uses = [[count * 0.99 for count in level] for level in uses]
        total = [0] * vocab
        for level in range(levels):
            for id in tokens[:, 3 * level : 3 * level + 3].flatten().tolist():
                uses[level][id] += 1
                last[level][id] = step
                total[id] += 1
        assert found.sum(0).tolist() == total and found.dtype == torch.int64
    assert torch.allclose(use.uses, torch.tensor(uses), rtol=1e-5)
    assert use.last_used.tolist() == last and int(use.steps) == 40
    assert use.ages().tolist() == [[40 - step for step in level] for level in last]
    assert len(set(last[0])) > 3


def test_figures_are_of_the_last_batches():
    use = CodebookUse(4, (4,))
    count(use, torch.tensor([[[0, 1, 2, 2]]]))  # 0 is used in the first batch only
    for _ in range(99):
        count(use, torch.tensor([[[1, 1, 1, 2]]]))
    assert use.figures()["usage"] == 3 / 4 and use.figures()["oldest"] == 100  # 3 never was
    count(use, torch.tensor([[[1, 1, 1, 2]]]))
    figures = use.figures()
    assert figures["usage"] == 2 / 4 and figures["oldest"] == 101
    p = [0.99**100, 0.0, 0.0, 0.0]
    p[1], p[2] = 0.99**100, 2 * 0.99**100
    for step in range(100):
        p[1], p[2] = p[1] + 3 * 0.99**step, p[2] + 0.99**step
    entropy = -sum(x / sum(p) * math.log(x / sum(p)) for x in p if x)
    assert figures["perplexity"] == pytest.approx(math.exp(entropy), rel=1e-5)


def test_a_code_is_dead_once_it_has_been_missed_long_enough():
    """64 codes, 32 tokens in a batch: a code of 1/20 of the mean use occurs 3 times in 120 batches."""
    use = CodebookUse(64, (32,))
    count(use, torch.arange(32).reshape(1, 4, 8))
    count(use, torch.arange(32, 64).reshape(1, 4, 8))
    for step in range(200):
        assert int(use.patience()) in (119, 120)
        expected = [0] if step > float(use.patience()) - 1 else []
        assert use.dead()[0].nonzero().flatten().tolist() == expected
        count(use, (1 + (torch.arange(32) + 32 * step) % 63).reshape(1, 4, 8))  # all but code 0
    assert use.figures()["dead"] == 1


def test_a_few_batches_without_a_common_code_do_not_kill_it():
    use = CodebookUse(2, (1000,))
    count(use, torch.tensor([[0, 1] * 500]))
    for step in range(11):
        assert not use.dead().any(), step
        count(use, torch.tensor([[0] * 1000]))
    assert use.dead().tolist() == [[False, True]]


def test_before_the_first_batch_nothing_is_dead():
    use = CodebookUse(8, (4,))
    assert use.figures() == {"usage": 0.0, "perplexity": 1.0, "dead": 0.0, "oldest": 0.0}


def test_a_saved_state_goes_on_as_if_it_had_not_been(tmp_path):
    batches = random_batches(24, 2)
    whole, first = observed(24, 2, batches), observed(24, 2, batches[:17])
    save_file(first.state_dict(), tmp_path / "use.safetensors")
    second = CodebookUse(24, (15, 15))
    second.load_state_dict(load_file(tmp_path / "use.safetensors"))
    for tokens in batches[17:]:
        count(second, tokens)
    assert set(whole.state_dict()) == {"uses", "last_used", "steps"}
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert second.figures() == whole.figures()


def one_of_two(folder: Path) -> None:
    """Half of the images of each batch."""
    rank, use = join_group(folder), CodebookUse(24, (15, 15))
    assert dist.get_world_size() == 2
    totals = []
    for tokens in load_file(folder / "batches.safetensors")["tokens"].chunk(2, 1)[rank]:
        totals.append(use.count(tokens))
    save_file({**use.state_dict(), "totals": torch.stack(totals)}, folder / f"{rank}.safetensors")
    leave_group()


def test_two_processes_count_what_one_does(tmp_path):
    batches = random_batches(24, 2)
    save_file({"tokens": torch.stack(batches)}, tmp_path / "batches.safetensors")
    fork_twice(__file__, tmp_path)
    use = CodebookUse(24, (15, 15))
    totals = torch.stack([count(use, tokens) for tokens in batches])
    for rank in range(2):
        found = load_file(tmp_path / f"{rank}.safetensors")
        assert torch.equal(found.pop("totals"), totals)
        for name, value in use.state_dict().items():
            assert torch.equal(found[name], value), (rank, name)


def test_levels_are_blocks_of_rows():
    tokens = torch.tensor([[[0, 1], [0, 0], [2, 2], [2, 1]]])
    assert count_tokens(tokens, (4, 4), 3).tolist() == [[3, 1, 0], [0, 1, 3]]
    assert count_tokens(tokens.flatten(1), (8,), 3).tolist() == [[3, 2, 3]]


# Distances


@pytest.mark.parametrize(("count", "dim"), [(2, 3), (300, 4), (1500, 16)])
def test_the_nearest_other_code_is_that_of_a_full_search(count, dim):
    codes = torch.randn(count, dim)
    every = torch.cdist(codes.double(), codes.double()).fill_diagonal_(math.inf)
    assert torch.allclose(nearest_other(codes).double(), every.min(1).values, atol=1e-5)


def test_codes_that_nearly_coincide_far_from_zero_are_told_apart():
    codes = torch.tensor([[1000.3, 0.0], [1000.3, 0.01], [-1000.3, 3.0], [-1000.3, 3.02]])
    assert nearest_other(codes).tolist() == pytest.approx([0.01, 0.01, 0.02, 0.02], rel=1e-4)


def test_of_many_codes_evenly_spaced_ones_are_searched(monkeypatch):
    monkeypatch.setattr(codebook, "SEARCHED", 1 << 10)
    monkeypatch.setattr(codebook, "HELD", 3000)
    codes = torch.randn(1000, 4)
    every = torch.cdist(codes, codes).fill_diagonal_(math.inf).min(1).values
    assert torch.allclose(nearest_other(codes), every[torch.arange(128) * 1000 // 128], atol=1e-4)


@pytest.mark.parametrize("normalize", [False, True])
def test_vectors_are_measured_to_their_own_code(normalize):
    model = make_tokenizer("vqvae", quantizer={"kind": "vq", "codes": 16, "dim": 4, "normalize": normalize}).eval()
    torch.nn.init.normal_(model.quantizer.codebook)
    images = torch.rand(5, 3, 12, 8) * 2 - 1
    with torch.no_grad():
        found = code_distances(model, images)
        vectors = model.encoder(images).movedim(1, -1).flatten(0, 2)
        codes = model.quantizer.lookup(model.encode(images)).movedim(1, -1).flatten(0, 2)
        vectors = torch.nn.functional.normalize(vectors, dim=1) if normalize else vectors
    assert list(found) == ["vector to its code", "code to nearest code"]
    assert np.allclose(found["vector to its code"], (vectors - codes).norm(dim=1), atol=1e-5)
    assert found["code to nearest code"].shape == (16,)


def test_looking_at_a_model_in_training_does_not_move_its_codebook():
    model = make_tokenizer("vqvae").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use = CodebookUse(32, (6,))
    assert list(code_distances(model, torch.rand(5, 3, 12, 8))) == ["code to nearest code"]
    use.picture(model, torch.rand(5, 3, 12, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["fsq", "lfq", "rvq"])
def test_without_one_learned_codebook_there_are_no_distances(kind):
    model = make_tokenizer("vqvae", quantizer={"kind": kind}).eval()
    assert code_distances(model, torch.rand(2, 3, 12, 8)) == {}
    assert code_distances(make_tokenizer("pixels"), None) == {}


# Pictures


@pytest.fixture
def titles(monkeypatch):
    """The titles of the charts that were drawn."""
    found, head = [], charts.head

    def recorded(axes, title, unit):
        found.append(title)
        head(axes, title, unit)

    monkeypatch.setattr(charts, "head", recorded)
    return found


USE, AGES, FAR = "How often each code is used", "How long ago each code was used", "How far apart codes lie"


@pytest.mark.parametrize(("vocab", "levels", "steps"), [(2, 1, 0), (2, 1, 3), (3, 64, 2), (1 << 18, 1, 2)])
def test_a_picture_of_any_codebook(titles, vocab, levels, steps):
    use = CodebookUse(vocab, (6,) * levels)
    for _ in range(steps):
        count(use, torch.randint(vocab, (2, levels * 2, 3)))
    model = make_tokenizer("pixels")
    model.levels = levels
    picture = use.picture(model)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert picture.shape[0] < 600 and picture.shape[1] < 1400 and picture.min() < 60
    assert titles == [USE, AGES]


def test_a_learned_codebook_has_a_panel_of_distances(titles):
    use, model = observed(32, 1, random_batches(32, 1)), make_tokenizer("vqvae").eval()
    alone = use.picture(model)
    both = use.picture(model, torch.rand(4, 3, 12, 8))
    assert titles == [USE, AGES, FAR, USE, AGES, "How far apart vectors and codes lie"]
    assert alone.shape == both.shape and not np.array_equal(alone, both)


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
