"""Tensors in pieces, in this process: alone in its group, or as the first of two that are pretended.

What two processes write and read is in tests/pipelines/training/test_sharding.py.
Covers: pipelines/training/checkpoints/states.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from givens.pieces import write_pieces
from ranks import of_ranks
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from pipelines.training.checkpoints.rotation import latest_state
from pipelines.training.checkpoints.sharded import (
    agreed,
    gather,
    is_sharded,
    piece,
    read_shards,
    read_whole,
    whole,
    write_shards,
)
from pipelines.training.checkpoints.states import load_best, load_state, prepare_state, save_state
from tokenizer.files import FormatError, IntegrityError, WeightsError


@contextmanager
def group(world: int = 1) -> Iterator[DeviceMesh]:
    """This process, alone, or the first of several that are not there."""
    if world == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def in_pieces(value: Tensor, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)


# Pieces


def test_a_piece_is_what_this_process_holds():
    plain, value = torch.randn(3), torch.randn(6, 2)
    assert piece(plain) is plain and whole(plain) is plain and not is_sharded({}) and not is_sharded({"a": plain})
    with group(2) as mesh:
        half = in_pieces(value, mesh)
        assert torch.equal(piece(half), value[:3]) and not isinstance(piece(half), DTensor)
        assert is_sharded({"a": plain, "b": half, "c": plain})
    with group() as mesh:
        assert torch.equal(whole(in_pieces(value, mesh)), value)


def test_weights_are_put_whole_into_another_model_or_nowhere():
    source, target = nn.Linear(3, 4), nn.Linear(3, 4)
    expected = {name: value.clone() for name, value in source.state_dict().items()}
    asked: list[str] = []
    with group() as mesh:
        fully_shard(source, mesh=mesh)
        assert is_sharded(source.state_dict())
        gather(source, target)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DTensor, "full_tensor", lambda tensor: asked.append("whole"))
            gather(source, None)
    assert asked == ["whole"] * 2  # as those that have a target wait for it
    assert all(torch.equal(value, expected[name]) for name, value in target.state_dict().items())
    assert target.weight.requires_grad and target.weight.grad_fn is None


# What fails on one process fails on all


def outcomes(raised: dict[int, Exception], together: bool = True) -> list[Exception | None]:
    """What each of three processes sees when these raise."""

    def work(rank: int) -> Exception | None:
        try:
            with agreed(together):
                if rank in raised:
                    raise raised[rank]
        except Exception as seen:
            return seen
        return None

    return of_ranks(3, work)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError("no space left"), OSError),
        (SafetensorError("no space left"), OSError),
        (WeightsError("no space left"), WeightsError),
        (IntegrityError("no space left"), WeightsError),
    ],
)
def test_the_failure_of_one_is_raised_by_all(error, kind):
    found = outcomes({1: error})
    assert found[1] is error
    for other in (found[0], found[2]):
        assert type(other) is kind and str(other) == "process 1: no space left"


def test_each_raises_its_own_and_the_others_that_of_the_first():
    one, two = OSError("one"), WeightsError("two")
    found = outcomes({1: one, 2: two})
    assert found[1] is one and found[2] is two and str(found[0]) == "process 1: one"
    assert outcomes({}) == [None] * 3
    assert outcomes({1: one}, together=False) == [None, one, None]


def test_a_bug_is_not_agreed_on():
    with pytest.raises(ZeroDivisionError), agreed(together=False):
        raise ZeroDivisionError


# Files


def test_what_is_written_in_pieces_is_read_in_any(tmp_path):
    tensors: dict[str, Any] = {
        "weight": torch.randn(6, 2),
        "count": torch.tensor(7.0),
        "half": torch.randn(4).bfloat16(),
    }
    with group() as mesh:
        write_shards(tmp_path / "model", {**tensors, "weight": in_pieces(tensors["weight"], mesh)})
        again = read_shards(tmp_path / "model", {"weight": in_pieces(torch.zeros(6, 2), mesh)}.get)
        assert isinstance(again["weight"], DTensor) and torch.equal(again["weight"].full_tensor(), tensors["weight"])
    assert [path.suffix for path in (tmp_path / "model").iterdir()] == [".safetensors"]
    found = read_shards(tmp_path / "model", lambda name: None)
    assert set(found) == set(tensors)
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    with group(2) as mesh:
        like = {"weight": in_pieces(torch.zeros(6, 2).double(), mesh), "half": in_pieces(torch.zeros(5), mesh)}
        found = read_shards(tmp_path / "model", like.get)
        assert found["weight"].dtype == torch.float32 and torch.equal(piece(found["weight"]), tensors["weight"][:3])
        assert not isinstance(found["half"], DTensor) and torch.equal(
            found["half"], tensors["half"]
        )  # of another shape


def test_a_whole_file_is_read_in_pieces_where_the_model_is(tmp_path):
    tensors = {"weight": torch.randn(6, 2), "other": torch.randn(4), "count": torch.tensor(7)}
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_whole(tmp_path / "model.safetensors", lambda name: None)
    assert set(found) == set(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)
    with group(2) as mesh:
        alike = distribute_tensor(torch.zeros(4), mesh, [Replicate()], src_data_rank=None)
        like = {"weight": in_pieces(torch.zeros(6, 2), mesh), "other": alike, "count": in_pieces(torch.zeros(2), mesh)}
        found = read_whole(tmp_path / "model.safetensors", like.get)
        assert torch.equal(piece(found["weight"]), tensors["weight"][:3])
        assert torch.equal(piece(found["other"]), tensors["other"]) and isinstance(found["other"], DTensor)
        assert not isinstance(found["count"], DTensor)


def test_what_cannot_be_read_or_written_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(WeightsError, match=rf"^{re.escape(str(path))}: not a readable safetensors file \(.+\)$"):
        read_whole(path, lambda name: None)
    folder = tmp_path / "model"
    write_pieces(folder, {"weight": torch.randn(6, 2)}, 3)
    (folder / "shard-00002-model-00001-of-00001.safetensors").unlink()
    with pytest.raises(WeightsError, match=f"^{re.escape(str(folder))}: pieces of weight are missing$"):
        read_shards(folder, lambda name: None)
    (folder / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"no such thing")
    with pytest.raises(WeightsError, match=rf"^{re.escape(str(folder))}: not readable shards \(.+\)$"):
        read_shards(folder, lambda name: None)
    with group() as mesh, pytest.raises(OSError, match="^process 0: .*Not a directory"):
        write_shards(path / "below", {"weight": in_pieces(torch.zeros(6, 2), mesh)})


def test_each_process_reads_for_itself(tmp_path, monkeypatch):
    """As one that resumes may find that it has nothing to read."""
    value = torch.randn(6, 2)
    with group() as mesh:
        write_shards(tmp_path / "model", {"weight": in_pieces(value, mesh)})
        for name in ("gather_object", "scatter_object_list", "broadcast_object_list", "all_gather_object"):
            monkeypatch.setattr(dist, name, lambda *given, **more: pytest.fail("it asked the others"))
        assert torch.equal(read_shards(tmp_path / "model", lambda name: None)["weight"], value)


def test_what_all_processes_have_is_written_by_the_first(tmp_path, monkeypatch):
    """Or the files of a resumed run would hold other tensors."""
    planned: list[Any] = []
    monkeypatch.setattr(dist.checkpoint, "save", lambda tensors, **how: planned.append(how["planner"]))
    write_shards(tmp_path, {})
    assert planned[0].dedup_save_to_lowest_rank is True


# States


class Sharded:
    """A model and its average, in pieces, with an optimizer that has taken a step."""

    def __init__(self, mesh: DeviceMesh, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model, self.ema = nn.Linear(3, 4), nn.Linear(3, 4)
        for module in (self.model, self.ema):
            fully_shard(module, mesh=mesh)
        self.optimizers = {"model": torch.optim.AdamW(self.model.parameters())}
        self.model(torch.randn(2, 3)).square().sum().backward()
        self.optimizers["model"].step()

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "ema": self.ema, "optimizers": self.optimizers}

    def held(self) -> dict[str, Tensor]:
        moments = self.optimizers["model"].state_dict()["state"]
        more = {f"{index}.{name}": value for index, entry in moments.items() for name, value in entry.items()}
        some = {**self.model.state_dict(prefix="model."), **self.ema.state_dict(prefix="ema."), **more}
        return {name: whole(value).detach().clone() for name, value in some.items()}


def test_a_state_in_pieces_is_as_one_that_is_whole(tmp_path):
    with group() as mesh:
        run = Sharded(mesh)
        held, best = run.held(), {"weight": torch.randn(4, 3).t()}
        for step in (1, 2, 3):
            what = {"counters": {"minutes": step}, "config": {"a": 1}, "best": best if step == 3 else None, "keep": 2}
            folder = save_state(tmp_path, step, **run.parts, **what)
            assert folder == tmp_path / "state" / f"step-{step:08d}"
        assert sorted(path.name for path in folder.parent.iterdir()) == ["step-00000002", "step-00000003"]
        assert latest_state(tmp_path) == folder
        assert {path.name for path in folder.iterdir()} == {
            *("model", "ema", "optimizer-model", "best.safetensors"),
            *("optimizer-model.json", "state.json", "manifest.json"),
        }
        state = json.loads((folder / "state.json").read_text())
        assert state == {"format_version": 1, "step": 3, "counters": {"minutes": 3}, "config": {"a": 1}}
        assert torch.equal(load_file(folder / "best.safetensors")["weight"], best["weight"])
        other = Sharded(mesh, seed=9)
        assert any(not torch.equal(value, held[name]) for name, value in other.held().items())
        assert load_state(folder, **other.parts) == (3, {"minutes": 3})
        assert all(torch.equal(value, held[name]) for name, value in other.held().items())


def test_a_state_in_pieces_that_cannot_be_saved_leaves_nothing(tmp_path):
    with group() as mesh:
        run = Sharded(mesh)
        kept = save_state(tmp_path, 1, **run.parts, counters={}, keep=1)
        with torch.no_grad():
            piece(run.ema.weight)[1, 1] = torch.nan
        said = "step 2 is not saved: weight (ema.safetensors) holds a value that is not finite"
        write = prepare_state(tmp_path, 2, **run.parts, counters={}, keep=1)  # which looks at nothing yet
        with pytest.raises(WeightsError, match=f"^{re.escape(said)}$"):
            write()
        assert list(kept.parent.iterdir()) == [kept]


def test_the_best_weights_are_there_if_they_are_expected(tmp_path):
    model = nn.Linear(3, 4)
    best = {name: value.clone() for name, value in model.state_dict().items()}
    parts: dict[str, Any] = {"model": model, "ema": None, "optimizers": {}, "counters": {}}
    without, with_them = save_state(tmp_path, 1, **parts), save_state(tmp_path, 2, **parts, best=best)
    found = load_best(with_them, model, True)
    assert found is not None and all(torch.equal(found[name], best[name]) for name in best)
    assert load_best(without, model, False) is None
    for folder, expected, word in ((without, True, "missing"), (with_them, False, "unexpected")):
        said = f"{folder / 'best.safetensors'}: {word}, by what state.json says of the best weights"
        with pytest.raises(FormatError, match=f"^{re.escape(said)}$"):
            load_best(folder, model, expected)
    with pytest.raises(WeightsError, match=r"best.safetensors: weight has shape \[4, 3\], expected \[5, 3\]$"):
        load_best(with_them, nn.Linear(3, 5), True)
