"""The depth head against the definition, level by level."""

import torch
import torch.nn.functional as F
from prior.heads.depth import Depth, DepthConfig

from tokenizer import TokenGrid

LEVELS = 4


def make():
    head = Depth(DepthConfig(dim=12, layers=2), TokenGrid((2 * LEVELS, 3), 7, levels=LEVELS))
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return head.double()


def test_a_level_is_read_from_the_sum_of_what_was_drawn():
    head = make()
    outputs, ids = torch.randn(5, head.size, dtype=torch.float64), torch.randint(7, (5, LEVELS))
    for level in range(LEVELS):
        x = outputs + head.level_embedding[level] + sum(head.id_embeddings[m][ids[:, m]] for m in range(level))
        for layer in head.layers:
            gate, up = layer.gate_up(layer.norm(x)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        expected = head.head(head.norm(x))
        assert torch.allclose(head.logits(outputs, ids)[:, level], expected)
        assert torch.allclose(head.next_logits(outputs, ids[:, :level]), expected)


def test_every_lower_level_matters_and_no_higher_one():
    head, outputs = make(), torch.randn(1, 12, dtype=torch.float64)
    ids = torch.zeros(1, LEVELS, dtype=torch.long)
    before = head.logits(outputs, ids)
    for level in range(LEVELS):
        changed = ids.clone()
        changed[0, level] = 3
        moved = (head.logits(outputs, changed) - before).abs().amax(-1)[0] > 1e-12
        assert moved.tolist() == [other > level for other in range(LEVELS)]


def test_sizes_come_from_the_settings():
    grid = TokenGrid((4, 2), 5, levels=2)
    wide, narrow = Depth(DepthConfig(dim=8, layers=3, hidden=40), grid), Depth(DepthConfig(dim=8), grid)
    assert len(wide.layers) == 3 and wide.layers[0].down.weight.shape == (8, 40)
    assert narrow.layers[0].down.weight.shape == (8, 16) and wide.size == narrow.size == 8
