"""The precision of a run: as requested or the fastest of the machine, and kept on resume."""

from __future__ import annotations

import pytest
import torch
from launch import losses, prior_arguments, tensors, train_prior, train_tokenizer
from one_process import begin_anew
from tiny_task import assert_same_run, killed_at, train_tiny
from torch.overrides import TorchFunctionMode

from pipelines.config import UserError
from pipelines.config.arguments import read_yaml_file
from pipelines.config.command import parse
from pipelines.config.schema import to_yaml
from pipelines.processes import launch
from pipelines.processes.launch import Precision, choose_precision, detect_cpu_bf16
from pipelines.train_prior import TrainPriorConfig
from pipelines.training.checkpoint import read_newest_record

pytestmark = pytest.mark.usefixtures("one_process")


def cpu_with(monkeypatch, *queries: str, capability: str = "AVX512") -> None:
    """Let torch report a CPU with these features."""
    for query in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, query, lambda query=query: query in queries, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)


def test_auto_is_what_the_cpu_is_fast_in(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    amx, avx512 = "_is_amx_tile_supported", "_is_avx512_bf16_supported"
    for queries, capability, found in (
        ((), "AVX512", ""),
        ((avx512,), "AVX512", "AVX512-BF16"),
        ((amx, avx512), "AVX2", ""),
        ((amx,), "AVX512", "AMX"),
    ):
        cpu_with(monkeypatch, *queries, capability=capability)
        assert detect_cpu_bf16() == found and choose_precision("auto", None).mixed == ("bf16" if found else "no")


def test_a_run_keeps_its_precision_and_a_launcher_may_change_its_own(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    cpu_with(monkeypatch, "_is_amx_tile_supported")
    for asked, earlier, mixed in (("no", "no", "no"), ("bf16", None, "bf16"), ("auto", "no", "no")):
        assert choose_precision(asked, earlier).mixed == mixed
    cpu_with(monkeypatch)
    assert choose_precision("auto", "bf16").mixed == "bf16"
    for launched in ("no", "bf16"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        assert choose_precision(None, "no") == choose_precision(None, "bf16") == Precision(launched)
    for launched in ("fp16", "fp8"):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
        with pytest.raises(UserError, match=f"^{launched} .*bf16"):
            choose_precision(None, None)
        assert choose_precision("no", None).mixed == "no"


def test_no_needs_no_quotes(tmp_path):
    """YAML reads a bare `no` as false; written configurations are read back unchanged."""
    for value in ("no", "'no'", "bf16", "auto", "null"):
        argv = prior_arguments(tmp_path, tmp_path) + [f"train.mixed_precision={value}"]
        config = parse(TrainPriorConfig, argv, verb="train_prior", description=None)
        assert config.train.mixed_precision == (None if value == "null" else value.strip("'"))
        (path := tmp_path / "config.yaml").write_text(to_yaml(config))
        assert type(config).model_validate(read_yaml_file(str(path))) == config


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_a_gpu_depends_on_the_gpu(monkeypatch, has_bf16):
    cpu_with(monkeypatch, *(() if has_bf16 else ("_is_amx_tile_supported",)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    assert choose_precision("auto", None).mixed == ("bf16" if has_bf16 else "no")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert choose_precision("auto", None).mixed == ("no" if has_bf16 else "bf16")


def test_a_resumed_run_keeps_its_precision_on_another_machine(tmp_path, tokens, monkeypatch, capsys):
    found = iter([("bf16", "this CPU has AMX"), ("bf16", "this CPU has AMX"), ("no", "it has nothing")])
    monkeypatch.setattr(launch, "find_fastest_precision", lambda: next(found))
    more = {"train__mixed_precision": "auto", "train__optimizer": "muon", "train__save_every": 2, "train__steps": 4}
    whole = train_prior(tmp_path / "whole", tokens, **more)
    assert "bf16 mixed precision (auto: this CPU has AMX)" in capsys.readouterr().out
    with killed_at(3):
        train_prior(tmp_path / "resumed", tokens, **more)
    assert read_newest_record(tmp_path / "resumed")["precision"] == "bf16" and capsys.readouterr()
    resumed = train_prior(tmp_path / "resumed", tokens, **more)
    said = capsys.readouterr().out
    assert "continuing from step 2; " in said and "bf16 mixed precision (auto: " in said
    assert_same_run(resumed, whole)


def test_a_launchers_precision_may_change_on_resume_with_a_line(tmp_path, monkeypatch, capsys):
    for stop, mixed, changes in ((3, "no", 0), (5, "no", 0), (7, "bf16", 1)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
        begin_anew()
        with killed_at(stop):
            train_tiny(tmp_path / "run", save_every=2)
        assert capsys.readouterr().out.count("mixed precision: no -> bf16") == changes
    assert read_newest_record(tmp_path / "run")["precision"] == "bf16" and read_newest_record(tmp_path) == {}


class Products(TorchFunctionMode):
    """Records the dtypes of layers' outputs and of losses."""

    def __init__(self) -> None:
        self.types: dict[str, set[torch.dtype]] = {}
        super().__init__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("conv2d", "linear", "cross_entropy", "l1_loss", "mse_loss", "cdist") and torch.is_grad_enabled():
            self.types.setdefault(name, set()).add(found.dtype)
        return found


def test_layers_compute_in_bfloat16_and_losses_and_weights_are_float32(tmp_path, tokens):
    """Runs of both precisions follow each other in one process."""
    ends = {}
    for mixed, computed in (("bf16", torch.bfloat16), ("no", torch.float32)):
        with Products() as seen:
            run = train_prior(tmp_path / mixed, tokens, train__mixed_precision=mixed, train__steps=3)
        ends[mixed] = losses(run)[-1]
        assert seen.types["linear"] == {computed}
        assert all(value.dtype != torch.bfloat16 for value in tensors(run).values())
    assert ends["bf16"] != ends["no"]
    with Products() as seen:
        train_tokenizer(tmp_path / "tokenizer", train__mixed_precision="bf16", train__steps=2)
    assert seen.types.pop("conv2d") == {torch.bfloat16}
    assert all(types == {torch.float32} for types in seen.types.values()) and seen.types
