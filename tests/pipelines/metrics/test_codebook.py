"""Codebook usage during training, in one process or several."""

import pytest
import torch
from ranks import of_ranks
from safetensors.torch import load_file, save_file
from small import make_tokenizer

from pipelines.metrics.codebook import CodebookUse


def random_batches(vocab, levels, count=40, seed=0):
    """Tokens (4, levels * 3, 5): ids above a limit that falls from batch to batch do not occur."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.linspace(vocab, max(1, vocab // 3), count).long().tolist()
    return [torch.randint(limit, (4, levels * 3, 5), generator=generator) for limit in limits]


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
    """No code is dead before the first batch, nor after a few batches without it."""
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


def test_a_saved_state_continues_exactly(tmp_path):
    batches, whole, first, second = random_batches(24, 2), *(CodebookUse(24, (15, 15)) for _ in range(3))
    for number, tokens in enumerate(batches):
        whole.count(tokens)
        (first if number < 17 else second).count(tokens)
        if number == 16:
            save_file(first.state_dict(), tmp_path / "use.safetensors")
            second.load_state_dict(load_file(tmp_path / "use.safetensors"))
    assert torch.equal(second.uses, whole.uses)


@pytest.mark.parametrize(("vocab", "levels", "steps"), [(2, 1, 0), (3, 64, 2)])
def test_any_codebook_has_a_picture(vocab, levels, steps):
    use, model = CodebookUse(vocab, (6,) * levels), make_tokenizer("pixels")
    model.levels = levels
    for _ in range(steps):
        use.count(torch.randint(vocab, (2, levels * 2, 3)))
    assert use.picture(model).min() < 60


def test_two_processes_count_what_one_does():
    """Each process counts half of the images of each batch."""
    batches, alone = random_batches(24, 2), CodebookUse(24, (15, 15))
    totals = [alone.count(tokens) for tokens in batches]

    def count(rank):
        use = CodebookUse(24, (15, 15))
        return [use.count(tokens.chunk(2)[rank]) for tokens in batches], use.uses

    for found, uses in of_ranks(2, count):
        assert torch.equal(torch.stack(found), torch.stack(totals)) and torch.equal(uses, alone.uses)
