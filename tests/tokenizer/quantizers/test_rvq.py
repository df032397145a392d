"""Residual quantization and SimVQ: what the papers promise, written out; and codebooks that two processes train.

What needs two processes runs in two that this file starts of itself (`python test_rvq.py FOLDER`).

Covers: tokenizer/quantizers/simvq.py.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import fork_twice, gathered, join_group, leave_group
from small import make_quantizer, train_on
from torch import Tensor

from tokenizer.quantizers import Quantizer
from tokenizer.quantizers.codebook import nearest
from tokenizer.quantizers.gradients import rotate_through

KINDS = [(book, shared) for book in ("ema", "vq", "simvq") for shared in (False, True)]
every_kind = pytest.mark.parametrize(("book", "shared"), KINDS)


def residual(book: str = "ema", depth: int = 3, shared: bool = False, **config: Any) -> Any:
    """A small one, in training mode."""
    node = {"kind": book, "codes": 32, "dim": 8, **config}
    return Quantizer.create("rvq", depth=depth, shared=shared, book=node).train()


def batch(step: int = 0, count: int = 8, rows: int = 4) -> Tensor:
    """Vectors `(count, 8, rows, 4)` of a few loose clusters, a function of the step."""
    generator = torch.Generator().manual_seed(step)
    centres = torch.randn(12, 8, generator=torch.Generator().manual_seed(99)) * 2
    chosen = centres[torch.randint(12, (count, rows, 4), generator=generator)].movedim(-1, 1)
    return chosen + 0.4 * torch.randn(count, 8, rows, 4, generator=generator)


def trained(steps: int = 3, *choices: Any, **config: Any) -> Any:
    """One that has seen some batches."""
    quantizer = residual(*choices, **config)
    for step in range(steps):
        train_on(quantizer, batch(step))
    return quantizer


def rows_of(z: Tensor) -> Tensor:
    return z.movedim(1, -1).reshape(-1, z.shape[1])


# Residual quantization


@every_kind
def test_one_level_is_the_book(book, shared):
    torch.manual_seed(0)
    one: Any = make_quantizer(book).train()
    torch.manual_seed(0)
    other = residual(book, 1, shared)
    for step in range(12):  # through a revival
        z, again = batch(step).requires_grad_(), batch(step).requires_grad_()
        expected, found = one.quantize(z), other.quantize(again)
        assert torch.equal(found.z_q, expected.z_q) and torch.equal(found.tokens, expected.tokens)
        for losses, weights, leaf in ((expected.losses, one, z), (found.losses, other, again)):
            sum(weights.loss_weights[name] * loss for name, loss in losses.items()).backward()  # type: ignore[union-attr]
            assert leaf.grad is not None
        assert torch.equal(again.grad, z.grad)
    for (key, value), (name, mine) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert name == f"books.0.{key}" and torch.equal(mine, value)


@every_kind
def test_each_level_takes_the_code_nearest_to_what_is_left(book, shared):
    quantizer = trained(3, book, 3, shared).eval()
    z = batch(7)
    z_q, tokens, _ = quantizer.quantize(z)
    assert tokens.shape == (8, 12, 4)
    left, total = rows_of(z), torch.zeros(8 * 4 * 4, 8)
    for level in range(3):
        ids = tokens[:, 4 * level : 4 * (level + 1)].reshape(-1)  # level l of row r stands in row l * rows + r
        table = quantizer.books[0 if shared else level].table().detach()
        distances = (left[:, None] - table).square().sum(2)
        chosen = distances.gather(1, ids[:, None])[:, 0]
        assert torch.allclose(chosen, distances.amin(1), atol=1e-5)
        left, total = left - table[ids], total + table[ids]
    assert torch.equal(rows_of(z_q), total) and torch.equal(quantizer.lookup(tokens), z_q)


@every_kind
def test_deeper_is_nearer(book, shared):
    quantizer = trained(10, book, 6, shared).eval()
    z = batch(77)
    tokens = quantizer.quantize(z).tokens.chunk(6, 1)
    tables, total, errors = quantizer.tables(), torch.zeros(1), []
    for ids, table in zip(tokens, tables, strict=True):
        total = total + F.embedding(ids, table).movedim(-1, 1)
        errors.append(F.mse_loss(total, z).item())
    assert all(after < before for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1] < 0.6 * errors[0]


@every_kind
def test_commitment_is_that_of_every_partial_sum(book, shared):
    quantizer = trained(3, book, 3, shared).eval()
    z = batch(5).requires_grad_()
    _, tokens, losses = quantizer.quantize(z)
    partial, sums = torch.zeros(1), []
    for ids, table in zip(tokens.chunk(3, 1), quantizer.tables(), strict=True):
        partial = partial + F.embedding(ids, table.detach()).movedim(-1, 1)
        sums.append(partial)
    expected = torch.stack([F.mse_loss(z, partial) for partial in sums]).mean()
    torch.testing.assert_close(losses["commitment"], expected)
    (found,) = torch.autograd.grad(losses["commitment"], z)
    torch.testing.assert_close(found, sum(2 * (z - partial) / z.numel() / 3 for partial in sums).detach())


def test_each_book_learns_from_its_own_level():
    """The codebook loss of level l pulls its codes to what the levels before it left; nothing else pulls codes."""
    quantizer = trained(3, "vq", 3, revive_below=0)
    z = batch(5).requires_grad_()
    before = [book.codebook.detach().clone() for book in quantizer.books]
    _, tokens, losses = quantizer.quantize(z)
    losses["commitment"].backward(retain_graph=True)
    pulled = z.grad.clone()
    losses["codebook"].backward()
    assert torch.equal(z.grad, pulled) and pulled.any()
    left = rows_of(z.detach())
    for book, codes, ids in zip(quantizer.books, before, tokens.chunk(3, 1), strict=True):
        ids = ids.reshape(-1)
        pull = torch.zeros(32, 8).index_add_(0, ids, 2 * (codes[ids] - left) / left.numel() / 3)
        torch.testing.assert_close(book.codebook.grad, pull)
        left = left - codes[ids]


@every_kind
def test_the_gradient_passes_the_sum_once(book, shared):
    for kind in ("straight_through", "rotation"):
        quantizer = trained(3, book, 4, shared, gradient=kind)
        z, upstream = batch(5).requires_grad_(), torch.randn(8, 8, 4, 4)
        z_q = quantizer.quantize(z).z_q
        (found,) = torch.autograd.grad(z_q, z, upstream)
        expected = upstream
        if kind == "rotation":
            leaf = rows_of(z.detach()).requires_grad_()
            rotated = rotate_through(leaf, rows_of(z_q.detach()))
            (expected,) = torch.autograd.grad(rotated, leaf, rows_of(upstream))
            found = rows_of(found)
        torch.testing.assert_close(found, expected)


@every_kind
def test_all_levels_are_quantized_before_any_book_moves(book, shared):
    quantizer = trained(4, book, 3, shared, **({} if book == "simvq" else {"revive_every": 1}))
    z, as_it_was = batch(9), copy.deepcopy(quantizer).eval()
    expected, found = as_it_was.quantize(z), train_on(quantizer, z)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.z_q, expected.z_q)
    assert [int(part.started) for part in quantizer.books] == [5] * (1 if shared else 3)
    if book == "ema":
        assert all(
            not torch.equal(a.codebook, b.codebook) for a, b in zip(quantizer.books, as_it_was.books, strict=True)
        )


def test_a_shared_book_moves_once_with_the_rows_of_all_levels():
    quantizer = trained(2, "ema", 3, True, decay=0.9, revive_below=0.0)
    (book,) = quantizer.books
    counts, sums, table = book.counts.clone(), book.sums.clone(), book.codebook.clone()
    z = batch(5)
    left = rows_of(z)
    use, total = torch.zeros(32), torch.zeros(32, 8)
    for ids in train_on(quantizer, z).tokens.chunk(3, 1):
        use += torch.bincount(ids.flatten(), minlength=32)
        total.index_add_(0, ids.flatten(), left)
        left = left - table[ids.flatten()]
    torch.testing.assert_close(book.counts, 0.9 * counts + 0.1 * use)
    torch.testing.assert_close(book.sums, 0.9 * sums + 0.1 * total, rtol=1e-4, atol=1e-4)
    assert float(use.sum()) == 3 * 128


@pytest.mark.parametrize("book", ["ema", "vq", "simvq"])
def test_books_start_on_what_is_left_for_them(book):
    rows = batch(0, 64)
    separate, shared = residual(book, 3), residual(book, 3, True)
    one = F.mse_loss(make_quantizer(book).train().quantize(rows).z_q, rows)
    for quantizer, share in ((separate, 0.4), (shared, 0.8)):
        z_q, tokens, _ = quantizer.quantize(rows)
        assert F.mse_loss(z_q, rows) < share * one
        used = [len(ids.unique()) for ids in tokens.chunk(3, 1)]
        assert min(used) >= (24 if quantizer is separate else 4)
    lengths = [part.codebook.norm(dim=1).mean().item() for part in separate.books]
    assert lengths[0] > 2 * lengths[1] > 2 * lengths[2]
    spread = shared.books[0].table().detach().norm(dim=1)
    assert spread.min() < 0.5 * spread.max()  # coarse codes, and fine ones


@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_of_fewer_levels_are_no_vectors(rows):
    quantizer = residual().eval()
    assert quantizer.lookup(torch.zeros(2, 3, 4, dtype=torch.long)).shape == (2, 8, 1, 4)
    with pytest.raises(ValueError):
        quantizer.lookup(torch.zeros(2, rows, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"book": {"kind": "fsq"}}, "book: must be one of ema, simvq, vq .got 'fsq'"),
        ({"book": {"kind": "rvq"}}, "book: must be one of ema, simvq, vq .got 'rvq'"),
        ({"book": {"kind": "ema", "normalize": True}}, "book.normalize: must be false"),
        ({"book": {"kind": "ema", "codez": 3}}, "book.codez: unknown key; did you mean 'book.codes'"),
        ({"book": {"codes": 3}}, "kind: missing"),
        ({"depth": 0}, "depth: must be >= 1"),
        ({"shared": 1}, "shared: expected true or false"),
    ],
)
def test_bad_configurations_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        Quantizer.create("rvq", **config)


# SimVQ


def test_only_the_map_learns_and_moves_all_codes():
    quantizer: Any = make_quantizer("simvq").train()
    train_on(quantizer, batch(0))
    assert {name for name, p in quantizer.named_parameters() if p.requires_grad} == {"map.weight", "map.bias"}
    frozen, before = quantizer.codebook.clone(), quantizer.table().detach()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.1)
    z = batch(1, 1, 1)  # four vectors: at most four codes are used
    quantizer.quantize(z).losses["codebook"].backward()
    optimizer.step()
    after = quantizer.table().detach()
    assert torch.equal(quantizer.codebook, frozen)
    assert ((after - before).norm(dim=1) > 1e-4).all()
    assert F.mse_loss(quantizer.eval().quantize(z).z_q, z) < F.mse_loss(before[nearest(rows_of(z), before)], rows_of(z))


def test_beta_is_on_the_commitment_of_the_mapped_codes():
    quantizer: Any = make_quantizer("simvq", beta=0.5).train()
    train_on(quantizer, batch(0))
    assert quantizer.loss_weights == {"codebook": 1.0, "commitment": 0.5}
    z = batch(1).requires_grad_()
    z_q, _, losses = quantizer.quantize(z)
    z_q = z_q.detach()
    (pull,) = torch.autograd.grad(losses["commitment"], z, retain_graph=True)
    torch.testing.assert_close(pull, 2 * (z.detach() - z_q) / z.numel())
    (bias,) = torch.autograd.grad(losses["codebook"], quantizer.map.bias)
    torch.testing.assert_close(bias, (2 * rows_of(z_q - z.detach()) / z.numel()).sum(0))


def test_codes_that_move_together_are_not_left_behind():
    """Vectors turn, grow and shift while the codebook learns. Free codes that are nobody's nearest stay behind."""
    use, errors = {}, {}
    turn = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)) / 3
    for name, config in (("simvq", {}), ("vq", {"revive_below": 0.0})):
        torch.manual_seed(0)
        quantizer = make_quantizer(name, codes=128, **config).train()
        optimizer = torch.optim.Adam(quantizer.parameters(), 1e-2)
        for step in range(150):
            share = step / 150
            turned = torch.matrix_exp(share * (turn - turn.t())) * (1 + share)
            z = (rows_of(batch(step, 32)) @ turned.t() + 3 * share).t()[None]
            quantized = quantizer.quantize(z)
            optimizer.zero_grad()
            quantized.losses["codebook"].backward()
            optimizer.step()
        use[name] = len(quantized.tokens.unique())
        errors[name] = quantized.losses["codebook"].item()
    assert use["simvq"] > 1.5 * use["vq"] and errors["simvq"] < 0.5 * errors["vq"], (use, errors)


# Two processes

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "vq": ("vq", {}),
    "directions": ("vq", {"normalize": True, "gradient": "rotation"}),
    "simvq": ("simvq", {}),
    "separate": ("rvq", {"depth": 2}),
    "shared": ("rvq", {"depth": 2, "shared": True}),
    "shared vq": ("rvq", {"depth": 2, "shared": True, "book": {"kind": "vq"}}),
    "accumulated": ("rvq", {"depth": 2}),
}
BUSY = {"decay": 0.9, "revive_every": 5, "revive_below": 0.3}  # codes die and rise all the time
STEPS = 20


def build(name: str) -> Any:
    """One of `RUNS`, its books busy."""
    kind, config = RUNS[name]
    sizes: dict[str, Any] = {"codes": 32, "dim": 8}
    torch.manual_seed(0)
    if kind == "rvq":
        book = {"kind": "ema", **sizes, **BUSY, **config.get("book", {})}
        return Quantizer.create(kind, **{**config, "book": book}).train()
    return Quantizer.create(kind, **sizes, **config, **(BUSY if kind != "simvq" else {})).train()


def parts_of(name: str, rank: int = 0, world: int = 1) -> list[slice]:
    """Which of 16 images a process sees in a step, micro-batch by micro-batch, as the training loop deals them out."""
    count = 2 if name == "accumulated" else 1
    size = 16 // count // world
    starts = [(index * world + rank) * size for index in range(count)]
    return [slice(start, start + size) for start in starts]


def drive(quantizer: Any, parts: list[slice]) -> list[str]:
    """Train on parts of each step's vectors, gradients averaged over processes; digests of the state at each step."""
    world, seen = dist.get_world_size() if dist.is_initialized() else 1, []
    for step in range(STEPS):
        z = batch(step, 16) * (1 + step / 10)
        quantizer.zero_grad()
        for part in parts:
            losses = quantizer.quantize(z[part].requires_grad_()).losses
            (sum(losses.values()) / len(parts)).backward()
        with torch.no_grad():
            for parameter in quantizer.parameters():
                if world > 1:
                    dist.all_reduce(parameter.grad)
                parameter -= 3.0 * parameter.grad / world
        state = b"".join(value.detach().numpy().tobytes() for value in quantizer.state_dict().values())
        seen.append(hashlib.sha256(state).hexdigest())
    return seen


def in_one_of_two(folder: Path) -> None:
    """What each process does: every run on its half of the vectors."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    rank, found = join_group(folder), {}
    for name in RUNS:
        quantizer = build(name)
        found[name] = gathered(drive(quantizer, parts_of(name, rank, dist.get_world_size())))
        if rank == 0:
            save_file(quantizer.state_dict(), folder / f"{name}.safetensors")
    if rank == 0:
        (folder / "found.json").write_text(json.dumps({"world": dist.get_world_size(), **found}))
    leave_group()


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("codebooks")
    fork_twice(__file__, folder)
    found = json.loads((folder / "found.json").read_text())
    assert found["world"] == 2
    return folder, found


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_hold_the_same_codebooks_at_every_step(pair, name):
    one, two = pair[1][name]
    assert one == two and len(one) == STEPS == len(set(one))


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_learn_what_one_does(pair, name):
    from safetensors.torch import load_file

    quantizer = build(name)
    drive(quantizer, parts_of(name))
    together = load_file(pair[0] / f"{name}.safetensors")
    for key, value in quantizer.state_dict().items():
        torch.testing.assert_close(together[key], value, rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    in_one_of_two(Path(sys.argv[1]))
