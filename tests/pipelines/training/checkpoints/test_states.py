"""Resume states: exact, atomic under kill -9, verified, rotated.

Covers: pipelines/training/checkpoints/optimizers.py, pipelines/training/checkpoints/rotation.py.
"""

import copy
import errno
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from givens.pieces import in_shards
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.training.checkpoints import rotation
from pipelines.training.checkpoints import states as checkpoint
from pipelines.training.checkpoints.optimizers import pack_optimizer, unpack_optimizer
from pipelines.training.checkpoints.rotation import latest_state
from pipelines.training.checkpoints.states import load_state, save_state
from pipelines.training.optimizers import Muon
from tokenizer.files import MANIFEST, FormatError, PipelineLoadError, WeightsError, verify_manifest, write_manifest

ROOT = Path(__file__).parents[4]


class Net(nn.Module):
    """Batch norm for buffers, a convolution for strides, tied weights for shared memory."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(width)
        self.head, self.tied = nn.Linear(width, 5, bias=False), nn.Linear(width, 5, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.conv(x)).mean((2, 3))
        return self.head(h) - self.tied(h * h)


KINDS = {
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), amsgrad=True, capturable=False, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "no-momentum": lambda p: torch.optim.SGD(p, lr=1e-2),
}


class Run:
    """A small run whose batch is a function of the step."""

    def __init__(self, kind: str = "foreach", width: int = 4, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = Net(width)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizers = {"model": KINDS[kind]([{"params": decayed}, {"params": rest, "weight_decay": 0.0}])}

    def advance(self, start: int, stop: int) -> list[float]:
        losses = []
        for step in range(start, stop):
            x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
            loss = self.model(x).square().mean()
            self.optimizers["model"].zero_grad()
            loss.backward()
            for group in self.optimizers["model"].param_groups:
                if not isinstance(group["lr"], torch.Tensor):
                    group["lr"] = 1e-2 / (1 + step)
            self.optimizers["model"].step()
            self.ema.update_parameters(self.model)
            losses.append(loss.item())
        return losses

    def save(self, run: Path, step: int, **more) -> Path:
        return save_state(
            run, step, model=self.model, ema=self.ema, optimizers=self.optimizers, **{"counters": {}, **more}
        )

    def load(self, folder: Path) -> tuple[int, dict]:
        return load_state(folder, model=self.model, ema=self.ema, optimizers=self.optimizers)


def assert_same(a, b, path: str = "") -> None:
    """Same types, dtypes, shapes, devices and bits, all the way down."""
    assert type(a) is type(b), f"{path}: {type(a)} and {type(b)}"
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape, a.device, a.stride()) == (b.dtype, b.shape, b.device, b.stride()), path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def held_by(run: Run) -> list:
    optimizers = [o.state_dict() for o in run.optimizers.values()]
    for saved in optimizers:
        saved["state"] = {i: dict(sorted(saved["state"][i].items())) for i in sorted(saved["state"])}
    return [dict(run.model.state_dict()), dict(run.ema.state_dict()), optimizers]


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_equals_uninterrupted(tmp_path, kind):
    whole = Run(kind)
    losses = whole.advance(0, 12)
    for at in (0, 1, 5, 11):
        first = Run(kind)
        first.advance(0, at)
        first.save(tmp_path / str(at), at, counters={"epoch": 3, "best": 0.1, "seen": [1, 2]})
        resumed = Run(kind, seed=99)
        step, counters = resumed.load(latest_state(tmp_path / str(at)))
        assert (step, counters) == (at, {"epoch": 3, "best": 0.1, "seen": [1, 2]})
        assert_same(held_by(resumed), held_by(first), "loaded")
        assert resumed.advance(at, 12) == losses[at:]
        assert_same(held_by(resumed), held_by(whole), "final")
        assert resumed.model.tied.weight is resumed.model.head.weight


def test_loaded_state_survives_the_deletion_of_its_files(tmp_path):
    run = Run()
    run.advance(0, 3)
    folder = run.save(tmp_path, 3)
    resumed = Run(seed=1)
    resumed.load(folder)
    for path in folder.iterdir():
        path.write_bytes(b"\0" * path.stat().st_size)
    assert_same(held_by(resumed), held_by(run))


def test_float32_moments_of_bfloat16_weights_stay_float32(tmp_path):
    model = nn.Linear(3, 2).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {
            "step": torch.tensor(7.0),
            "exp_avg": torch.randn(p.shape),
            "exp_avg_sq": torch.rand(p.shape),
        }
    folder = save_state(tmp_path, 1, model=model, ema=None, optimizers={"a": optimizer}, counters={})
    other = nn.Linear(3, 2).bfloat16()
    loaded = torch.optim.AdamW(other.parameters())
    load_state(folder, model=other, ema=None, optimizers={"a": loaded})
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(dict(sorted(loaded.state[q].items())), dict(sorted(optimizer.state[p].items())))


def test_nothing_is_pickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    run = Run()
    run.advance(0, 2)
    for module, names in ((torch, ("load", "save")), (pickle, ("load", "loads", "dump", "dumps", "Unpickler"))):
        for name in names:
            monkeypatch.setattr(module, name, refuse)
    run.save(tmp_path, 2)
    folder = latest_state(tmp_path)
    Run(seed=1).load(folder)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_rotation_keeps_the_newest(tmp_path):
    run = Run()
    for step in (1, 2, 3, 10, 100_000_000):
        run.save(tmp_path, step, keep=2)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step-00000010", "step-100000000"]
    assert latest_state(tmp_path).name == "step-100000000"


def test_rotation_never_deletes_what_was_just_saved(tmp_path):
    run = Run()
    (run.save(tmp_path, 9) / "state.json").write_text("{}")
    for step in (5, 6):
        run.save(tmp_path, step, keep=1)
        assert latest_state(tmp_path).name == f"step-{step:08d}"


def damage_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": damage_byte,
    "missing": Path.unlink,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "empty": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_falls_back_to_the_previous_state_and_is_named(tmp_path, capsys, damage):
    run = Run()
    run.advance(0, 2)
    run.save(tmp_path, 1)
    names = [path.name for path in run.save(tmp_path, 2).iterdir()]
    assert len(names) == 6
    for name in names:
        shutil.copytree(tmp_path, tmp_path / "copies" / name / "run", ignore=shutil.ignore_patterns("copies"))
        broken = tmp_path / "copies" / name / "run"
        DAMAGE[damage](broken / "state" / "step-00000002" / name)
        assert latest_state(broken).name == "step-00000001"
        warning = capsys.readouterr().err
        assert warning.count("\n") == 1 and "step-00000002" in warning and name in warning
        with pytest.raises(PipelineLoadError):
            run.load(broken / "state" / "step-00000002")
        run.save(broken, 2)  # the run comes by that step again
        assert latest_state(broken).name == "step-00000002" and not capsys.readouterr().err


def test_leftovers_are_removed_and_never_chosen(tmp_path):
    assert latest_state(tmp_path) is None
    folder = Run().save(tmp_path, 1)
    names = (
        ".tmp-step-00000002-abcd0123",
        ".del-step-00000003-abcd4567",
        "../.tmp-.tmp-tokenizer-01234567-89abcdef",
        "../.tmp-pipeline-01234567",
        "../previews/.tmp-samples-00000010.png-01234567.png",
    )
    for name in names:
        shutil.copytree(folder, folder.parent / name)
    assert latest_state(tmp_path) == folder
    assert list(folder.parent.iterdir()) == [folder] and not list((tmp_path / "previews").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["previews", "state"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_tensor_is_refused_by_name(tmp_path, value):
    run = Run()
    run.advance(0, 1)
    kept = run.save(tmp_path, 1)
    with torch.no_grad():
        run.model.norm.running_var[2] = value
    with pytest.raises(WeightsError, match=r"norm\.running_var"):
        run.save(tmp_path, 2)
    assert list(kept.parent.iterdir()) == [kept]


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    run = Run()
    kept = run.save(tmp_path, 1)
    size = sum(path.stat().st_size for path in kept.iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, int(1.2 * size) - 1))
    with pytest.raises(OSError, match=rf"{kept.parent}.*{int(1.2 * size)} bytes.*{int(1.2 * size) - 1}") as caught:
        run.save(tmp_path, 2)
    assert caught.value.errno == errno.ENOSPC
    assert list(kept.parent.iterdir()) == [kept]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, int(1.2 * size)))
    run.save(tmp_path, 2)


def test_an_error_while_writing_leaves_the_old_states(tmp_path, monkeypatch):
    run = Run()
    kept = run.save(tmp_path, 1, keep=1)
    monkeypatch.setattr(
        checkpoint, "write_manifest", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full"))
    )
    with pytest.raises(OSError, match="full"):
        run.save(tmp_path, 2, keep=1)
    assert list(kept.parent.iterdir()) == [kept] and latest_state(tmp_path) == kept


def test_mismatches_are_named(tmp_path):
    run = Run()
    run.advance(0, 2)
    folder = run.save(tmp_path, 2)

    def load(message: str, model=None, ema=run.ema, optimizers=None) -> None:
        with pytest.raises(PipelineLoadError, match=message):
            load_state(folder, model=model or Run().model, ema=ema, optimizers=optimizers or run.optimizers)

    load(r"conv\.weight has shape \[4, 3, 3, 3\], expected \[6, 3, 3, 3\]", model=Net(6))
    load(r"conv\.weight has type torch\.float32, expected torch\.float64", model=Net().double())
    load(r"missing tensors .*0\.weight", model=nn.Sequential(nn.Linear(2, 2)))
    load(r"unexpected \['ema\.safetensors'\]", ema=None)
    load(r"missing \['optimizer-critic\.json'", optimizers={**run.optimizers, "critic": run.optimizers["model"]})
    load(r"parameters\[0\] is .*4, 3, 3, 3.*6, 3, 3, 3", optimizers=Run(width=6).optimizers)
    load(r"kind is 'AdamW', expected 'SGD'", optimizers=Run("momentum").optimizers)
    load(r"groups", optimizers={"model": torch.optim.AdamW(run.model.parameters())})


def with_betas(betas: list) -> Callable[[dict], dict]:
    """Other ones in a document of an optimizer."""
    return lambda d: {**d, "param_groups": [{**group, "betas": {"$tuple": betas}} for group in d["param_groups"]]}


def test_a_state_that_lies_is_a_load_error(tmp_path):
    """Consistent manifest, wrong content: what a hash cannot catch must still not escape as another exception."""
    run = Run()
    run.advance(0, 1)
    for number, (name, edit) in enumerate(
        [
            ("optimizer-model.json", lambda d: {**d, "param_groups": [{"params": {"$tensor": "no"}}]}),
            ("optimizer-model.json", lambda d: {**d, "param_groups": [{**g, "lr": "fast"} for g in d["param_groups"]]}),
            ("optimizer-model.json", with_betas([0.9, [0.5]])),
            ("optimizer-model.json", with_betas([[[1]]])),
            ("state.json", lambda d: {**d, "step": 7}),
        ]
    ):
        folder = run.save(tmp_path / str(number), 1)
        (folder / name).write_text(json.dumps(edit(json.loads((folder / name).read_text()))))
        (folder / "manifest.json").unlink()
        checkpoint.write_manifest(folder, step=1)
        with pytest.raises(PipelineLoadError, match=name.split(".")[0]):
            Run().load(folder)


def test_settings_and_counts_of_another_run_are_refused(tmp_path):
    """torch would take them, and fail or go wrong at the next step."""

    def changed(name: str, message: str, settings: dict | None = None, tensors: dict | None = None, drop="") -> None:
        run = Run()
        run.advance(0, 1)
        folder = run.save(tmp_path / name, 1)
        path = folder / "optimizer-model.json"
        document = json.loads(path.read_text())
        document["param_groups"][0] |= settings or {}
        path.write_text(json.dumps(document))
        saved = load_file(path.with_suffix(".safetensors"))
        saved.pop(drop, None)
        save_file({**saved, **(tensors or {})}, path.with_suffix(".safetensors"))
        (folder / MANIFEST).unlink()
        write_manifest(folder, step=1)
        with pytest.raises(WeightsError, match=message):
            Run().load(folder)

    changed("amsgrad", "amsgrad is True, this run's is False", {"amsgrad": True})
    changed("decay", "weight_decay is 7, this run's is 0.01", {"weight_decay": 7})
    changed("steps", "0.step is -4.0, expected a count of steps", tensors={"0.step": torch.tensor(-4.0)})
    changed("no number", "0.step is nan, expected a count of steps", tensors={"0.step": torch.tensor(math.nan)})
    changed("places", r"params are \[1, 0\], expected \[0, 1\]", {"params": [1, 0]})
    changed("less", r"parameter 0 has \['exp_avg', 'step'\], expected", drop="0.exp_avg_sq")
    changed("more", r"parameter 1 has .*'other'.*, expected \['exp_avg", tensors={"1.other": torch.ones(5, 4)})
    for name in ("int32", "float64"):
        other = torch.ones(4, 3, 3, 3).to(getattr(torch, name))
        changed(name, f"a tensor of type torch.{name}, its parameter has", tensors={"0.exp_avg": other})


def test_momenta_of_muon_are_there_by_their_name():
    """It would begin anew without a word."""
    linear, x = nn.Linear(16, 16), torch.ones(1, 16)
    groups = [{"params": [linear.weight], "momentum": 0.9, "factor": 1.0, "bf16": False}, {"params": [linear.bias]}]
    optimizer = Muon(groups, lr=0.1)
    linear(x).sum().backward()
    optimizer.step()
    tensors, document = pack_optimizer(optimizer)
    unpack_optimizer(Path("a"), tensors, document, optimizer)
    tensors["0.moment"] = tensors.pop("0.momentum")
    with pytest.raises(WeightsError, match=r"parameter 0 has \['moment'\], expected \['momentum'\]"):
        unpack_optimizer(Path("a"), tensors, document, optimizer)


def test_how_a_machine_computes_a_step_is_its_own(tmp_path):
    """A state of one with a GPU goes on here."""
    run = Run()
    run.advance(0, 2)
    folder = run.save(tmp_path, 2)
    path = folder / "optimizer-model.json"
    document = json.loads(path.read_text())
    document["param_groups"][0] |= {"capturable": True, "fused": True, "foreach": False}
    path.write_text(json.dumps(document))
    (folder / MANIFEST).unlink()
    write_manifest(folder, step=2)
    other = Run(seed=99)
    names, own = ("capturable", "fused", "foreach"), dict(other.optimizers["model"].param_groups[0])
    other.load(folder)
    group = other.optimizers["model"].param_groups[0]
    assert [group[name] for name in names] == [own[name] for name in names]
    assert other.advance(2, 4) == run.advance(2, 4)


# Shards


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 3])
def test_shards_are_read_as_what_they_are_pieces_of(tmp_path, kind, count):
    """Uneven and empty ones, of any optimizer: everything as it was, and it goes on as it would have."""
    run, other = Run(kind), Run(kind, seed=99)
    run.advance(0, 4)
    folder = in_shards(run.save(tmp_path, 4, counters={"epoch": 3}), count)
    assert latest_state(tmp_path) == folder
    assert other.load(folder) == (4, {"epoch": 3})
    assert_same(held_by(other), held_by(run))
    assert other.advance(4, 8) == run.advance(4, 8)


def test_shards_are_as_strict(tmp_path):
    """A tensor too many, of another shape or type, a piece that is missing, a file that is damaged, a part too few."""
    changes = {"head.weight": torch.zeros(7, 4), "extra": torch.zeros(3), "conv.bias": torch.zeros(4).double()}
    messages = [
        "head.weight has shape [7, 4], expected [5, 4]",
        "unexpected tensors ['extra']",
        "conv.bias has type torch.float64, expected torch.float32",
    ]
    for (name, value), message in zip(changes.items(), messages, strict=True):
        run = Run()
        folder = in_shards(run.save(tmp_path / name, 1), **{name: value})
        with pytest.raises(WeightsError) as error:
            run.load(folder)
        assert message in str(error.value) and str(folder / "model") in str(error.value)

    def spoilt(name: str, spoil, kind: type, message: str) -> None:
        run = Run()
        folder = in_shards(run.save(tmp_path / name, 1))
        spoil(folder)
        (folder / MANIFEST).unlink()
        write_manifest(folder, step=1)
        with pytest.raises(kind, match=message):
            run.load(folder)

    for name, put in {"pipe": os.mkfifo, "file": Path.touch}.items():
        run = Run()
        folder = in_shards(run.save(tmp_path / name, 1))
        (folder / "ema" / ".DS_Store").touch()
        assert run.load(folder)[0] == 1
        put(folder / "ema" / "shard-9.safetensors")  # all that lies in a folder of shards is read
        with pytest.raises(FormatError, match="'ema/shard-9.safetensors' is not among the files that its manifest"):
            run.load(folder)

    second = "shard-00002-model-00001-of-00001.safetensors"
    spoilt("gap", lambda state: (state / "model" / second).unlink(), WeightsError, "model: pieces of .* are missing")
    spoilt("cut", lambda state: (state / "ema" / second).write_bytes(b"cut"), WeightsError, "ema: not readable shards")
    spoilt("part", lambda state: shutil.rmtree(state / "ema"), FormatError, r"missing \['ema.safetensors'\]")


def test_a_missing_or_changed_shard_is_passed_over(tmp_path, capsys):
    run = Run()
    run.save(tmp_path, 1)
    for step, spoil in ((2, Path.unlink), (3, lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"))):
        spoil(sorted((in_shards(run.save(tmp_path, step, keep=9)) / "ema").iterdir())[1])
    assert latest_state(tmp_path).name == "step-00000001"
    printed = capsys.readouterr().err
    assert "step-00000002 is passed over" in printed and "step-00000003 is passed over" in printed
    assert printed.count("shard-00002-model-00001-of-00001.safetensors") == 2


KILLED = """
    import os, random, signal, sys, time
    from pathlib import Path
    import torch
    from torch import nn
    torch.set_num_threads(1)
    from pipelines.training.checkpoints.rotation import latest_state
    from pipelines.training.checkpoints.states import load_state, save_state
    from tokenizer import files

    run = Path(sys.argv[1])
    model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(8)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def save(step):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(step)
        save_state(run, step, model=model, ema=None, optimizers={"m": optimizer}, counters={}, keep=KEEP)

    def child(before_call):
        calls = [0]
        def counted(call):
            def count(*paths):
                calls[0] += 1
                if calls[0] == before_call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*paths)
            return count
        Path.rename, files.fsync = counted(Path.rename), counted(files.fsync)
        step = STEP
        while True:
            save(step)
            step += STRIDE

    save(1)
    STEP = LAST = 1
    inside = 0
    plans = [(0, random.uniform(0.0, 0.15)) for _ in range(3)] + [(n, 10.0) for n in range(1, 17)]
    for kill_at, delay in plans:
        pid = os.fork()
        if pid == 0:
            child(kill_at)
        if kill_at == 0:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        inside += any(p.name.startswith((".tmp", ".del")) for p in (run / "state").iterdir())
        folder = latest_state(run)
        assert folder is not None, "no state left"
        step, _ = load_state(folder, model=model, ema=None, optimizers={"m": optimizer})
        assert step >= LAST and all((p == step).all() for p in model.parameters()), "a state of two steps"
        LAST, STEP = step, step + STRIDE
    assert inside >= 3, f"only {inside} kills hit a save"
    assert LAST > 1 or STRIDE == 0
"""


@pytest.mark.parametrize(
    ("stride", "keep"), [(1, 2), pytest.param(0, 1, marks=pytest.mark.slow)], ids=["next-step", "same-step-only-state"]
)
def test_kill_leaves_a_verifying_state(tmp_path, stride, keep):
    code = textwrap.dedent(KILLED)
    for name, value in {"STRIDE": stride, "KEEP": keep}.items():
        code = code.replace(name, str(value))
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    verify_manifest(latest_state(tmp_path))


def test_a_moment_of_another_shape_than_its_weight_is_refused(tmp_path):
    """The state would load, and the next step fail."""
    run = Run()
    run.advance(0, 1)
    folder = run.save(tmp_path, 1)
    path = folder / "optimizer-model.safetensors"
    tensors = load_file(path)
    name = next(key for key, value in tensors.items() if value.ndim > 1)
    path.unlink()
    save_file({**tensors, name: tensors[name][:1].clone()}, path)
    (folder / MANIFEST).unlink()
    write_manifest(folder, step=1)
    with pytest.raises(WeightsError, match="a tensor of shape .*, its parameter has"):
        Run().load(folder)


# What is set aside


def whole_state(run: Path, step: int) -> Path:
    """The folder of a small state."""
    return save_state(run, step, model=nn.Linear(2, 2), ema=None, optimizers={}, counters={})


def test_the_only_state_set_aside_by_a_kill_gets_its_name_back(tmp_path):
    """Between two renames it has no other; its name may have more than eight digits."""
    state = whole_state(tmp_path, 123456789)
    state.rename(state.with_name(f".del-{state.name}-0123abcd"))
    assert latest_state(tmp_path) == state and state.is_dir()
    assert [path.name for path in state.parent.iterdir()] == [state.name]


def test_states_are_in_the_order_of_their_steps(tmp_path):
    """Which is not that of their names once a step has nine digits."""
    for name in ("step-100000000", "step-99999999", "step-00000007"):
        (tmp_path / name).mkdir()
    assert [rotation.step_of(path) for path in rotation.states_in(tmp_path)] == [7, 99999999, 100000000]


def test_what_cannot_be_deleted_now_is_deleted_at_the_next_start(tmp_path, monkeypatch):
    """By the name under which it is left; and no error of deleting ends a run."""
    asked = []
    whole_state(tmp_path, 1)
    saved = whole_state(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(rotation.shutil, "rmtree", lambda path, ignore_errors=False: asked.append(ignore_errors))
        rotation.rotate(saved, 1)
    left = [path.name for path in saved.parent.iterdir() if path != saved]
    assert len(left) == 1 and asked == [True] and rotation.LEFT.fullmatch(left[0])
    assert latest_state(tmp_path) == saved and [path.name for path in saved.parent.iterdir()] == [saved.name]


# What is said, in full


def resealed(folder: Path, change: Callable[[dict], object]) -> Path:
    """A state whose state.json says something else, and whose manifest lists it so."""
    path = folder / "state.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    (folder / MANIFEST).unlink()
    write_manifest(folder, step=1)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.update(format_version=3), "format_version: found 3, this version reads 1"),
        (lambda d: d.update(format_version=0), "format_version: found 0, this version reads 1"),
        (lambda d: d.update(format_version=True), "format_version: found True, this version reads 1"),
        (lambda d: d.update(step=2), "expected counters and step 1, found step 2"),
        (lambda d: d.update(step=1.0), "expected counters and step 1, found step 1.0"),
        (lambda d: d.pop("step"), "expected counters and step 1, found step None"),
        (lambda d: d.update(counters=[]), "expected counters and step 1, found step 1"),
    ],
)
def test_what_is_wrong_with_a_state_is_told_in_full(tmp_path, change, said):
    folder = resealed(whole_state(tmp_path, 1), change)
    with pytest.raises(FormatError, match=f"^{re.escape(f'{folder}/state.json: {said}')}$"):
        load_state(folder, model=nn.Linear(2, 2), ema=None, optimizers={})


def test_a_state_under_another_name_is_told_in_full(tmp_path):
    folder = whole_state(tmp_path, 1)
    other = folder.rename(folder.with_name("step-00000002"))
    said = f"{other}: a state of step 1, which has another name; nothing was changed"
    with pytest.raises(FormatError, match=f"^{re.escape(said)}$"):
        load_state(other, model=nn.Linear(2, 2), ema=None, optimizers={})
    other = other.rename(folder.with_name("copy"))  # whose name says nothing
    assert load_state(other, model=nn.Linear(2, 2), ema=None, optimizers={}) == (1, {})


def test_parts_that_are_missing_or_too_many_are_told_in_full(tmp_path):
    model = nn.Linear(2, 2)
    optimizers = {"a": torch.optim.SGD(model.parameters(), lr=1.0)}
    plain, full = whole_state(tmp_path / "a", 1), Run().save(tmp_path / "b", 1)

    def refused(folder: Path, said: str, **what) -> None:
        with pytest.raises(FormatError, match=f"^{re.escape(f'{folder}: not a state of this run: {said}')}$"):
            load_state(folder, **{"model": model, "ema": None, "optimizers": {}, **what})

    refused(plain, "missing ['ema.safetensors'], unexpected []", ema=model)
    missing = "['optimizer-a.json', 'optimizer-a.safetensors']"
    refused(plain, f"missing {missing}, unexpected []", optimizers=optimizers)
    extra = "['ema.safetensors', 'optimizer-model.json', 'optimizer-model.safetensors']"
    refused(full, f"missing [], unexpected {extra}")
    refused(
        full,
        f"missing {missing}, unexpected {extra[:-1].split(', ', 1)[1].join('[]')}",
        ema=model,
        optimizers=optimizers,
    )


def test_tensors_that_are_missing_or_too_many_are_told_in_full(tmp_path):
    folder = whole_state(tmp_path, 1)

    def refused(model: nn.Module, said: str) -> None:
        with pytest.raises(WeightsError, match=f"^{re.escape(f'{folder}/model.safetensors: {said}')}$"):
            load_state(folder, model=model, ema=None, optimizers={})

    refused(nn.Linear(2, 3), "weight has shape [2, 2], expected [3, 2]")
    refused(nn.Linear(2, 2).double(), "weight has type torch.float32, expected torch.float64")
    refused(nn.Linear(2, 2, bias=False), "missing tensors [], unexpected tensors ['bias']")
    many = nn.ModuleDict({f"m{number}": nn.Linear(2, 2, bias=False) for number in range(7)})
    wanted = [f"m{number}.weight" for number in range(5)]  # no more of them than a line has room for
    refused(many, f"missing tensors {wanted}, unexpected tensors ['bias', 'weight']")


def test_what_is_not_finite_is_told_in_full_and_what_cannot_be_is_not_asked(tmp_path):
    model = nn.BatchNorm2d(3)
    model.running_mean[1] = math.inf
    said = "step 7 is not saved: running_mean (model.safetensors) holds a value that is not finite"
    with pytest.raises(WeightsError, match=f"^{re.escape(said)}$"):
        save_state(tmp_path, 7, model=model, ema=None, optimizers={}, counters={})
    best = {"weight": torch.tensor([1.0, math.nan])}
    said = "step 7 is not saved: weight (best.safetensors) holds a value that is not finite"
    with pytest.raises(WeightsError, match=f"^{re.escape(said)}$"):
        save_state(tmp_path, 7, model=nn.Linear(2, 2), ema=None, optimizers={}, counters={}, best=best)
    assert list((tmp_path / "state").iterdir()) == []
    save_state(tmp_path, 7, model=nn.BatchNorm2d(3), ema=None, optimizers={}, counters={})  # it counts its batches


def test_a_state_says_what_it_is_of_and_two_are_kept_unless_it_is_told(tmp_path):
    for step in (1, 2, 3):
        folder = whole_state(tmp_path, step)
    assert [path.name for path in rotation.states_in(tmp_path / "state")] == ["step-00000002", "step-00000003"]
    assert json.loads((folder / "state.json").read_text()) == {
        "format_version": 1,
        "step": 3,
        "counters": {},
        "config": None,
    }
    assert json.loads((folder / MANIFEST).read_text())["step"] == 3


def test_what_was_prepared_is_a_copy(tmp_path):
    """What training does meanwhile to weights, counters or configuration is not of that step."""
    run, counters, config = Run(), {"window": {"loss": [1.0, 2]}}, {"a": {"b": 1}}
    run.advance(0, 2)
    held, names = held_by(run), {"model": run.model, "ema": run.ema, "optimizers": run.optimizers}
    held = copy.deepcopy(held)
    write = checkpoint.prepare_state(tmp_path, 2, **names, counters=counters, config=config)
    run.advance(2, 4)
    counters["window"]["loss"][1], config["a"]["b"] = 3, 2
    folder, other = write(), Run(seed=9)
    assert other.load(folder) == (2, {"window": {"loss": [1.0, 2]}})
    assert_same(held_by(other), held)
    assert json.loads((folder / "state.json").read_text())["config"] == {"a": {"b": 1}}
