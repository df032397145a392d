"""Joining the processes that share a command's work: their devices, unsupported options, and leaving the group."""

from __future__ import annotations

import sys
from contextlib import suppress
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils.dataclasses import DistributedType
from launch import launched, metrics, output_of, start, tokenizer_arguments, train_tokenizer

from pipelines.config import UserError
from pipelines.images import loading
from pipelines.processes import launch
from pipelines.processes.group import ALONE, ProcessGroup
from pipelines.processes.launch import LAUNCHERS, REFUSED, TWO_PROCESSES, build_accelerator, join_group, own_device


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_processes_use_the_devices_that_accelerate_chose_and_one_alone_the_requested_device():
    for rank in range(2):
        given, group = torch.device("meta", rank), ProcessGroup(rank, 2)
        assert own_device("auto", given, group) == own_device("meta", given, group) == given
        for other in ("cpu", "cuda", "meta:0"):
            with pytest.raises(UserError, match=f"^device: '{other}'"):
                own_device(other, given, group)
    assert own_device("auto", torch.device("cpu:0"), ProcessGroup(1, 2)) == torch.device("cpu")
    assert own_device("auto", torch.device("meta:1"), ALONE) == torch.device("meta:1")
    assert own_device("cpu", torch.device("meta:1"), ALONE) == torch.device("cpu")
    with pytest.raises(UserError, match="^device: 'nonsense'"):
        own_device("nonsense", torch.device("cpu"), ALONE)


def test_a_process_without_a_launcher_is_alone_and_does_not_import_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # importing it is an error
    with join_group("cpu") as (group, device):
        assert group is ALONE and device == torch.device("cpu")


def test_one_process_in_place_of_several_is_refused(one_process, monkeypatch):
    """An address alone is fine, because many batch scripts export one; with a precision, accelerate's launcher has set
    it for several processes."""
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    for variables, accepted in (
        ({}, True),
        ({"WORLD_SIZE": "1"}, True),
        ({"WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            if accepted:
                assert build_accelerator().num_processes == 1
            else:
                with pytest.raises(UserError) as refused:
                    build_accelerator()
                assert TWO_PROCESSES in str(refused.value)


@pytest.mark.parametrize("error", [None, UserError("no")])
def test_launched_processes_leave_their_group_once_also_after_a_refusal(monkeypatch, error):
    end, facts = Mock(), {"process_index": 0, "num_processes": 1, "device": torch.device("cpu", 0)}
    monkeypatch.setattr(launch, "build_accelerator", lambda: SimpleNamespace(**facts, end_training=end))
    monkeypatch.setenv("RANK", "0")
    with suppress(UserError), join_group("auto") as (group, device):
        assert (group, device) == (ALONE, torch.device("cpu")) and not end.called
        if error:
            raise error
    end.assert_called_once()


@pytest.mark.parametrize("variable", REFUSED)
def test_unsupported_options_are_refused_before_images_are_read(one_process, variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(loading, "open_digits", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(UserError, match="--use_fsdp --fsdp_version 2"):
        train_tokenizer(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_file_of_accelerate_config_works_unchanged(tmp_path):
    """For two GPUs, whose processes share the CPU here."""
    path = tmp_path / "home" / "accelerate" / "default_config.yaml"
    path.parent.mkdir(parents=True)
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": DistributedType.MULTI_GPU}
    config |= {"mixed_precision": "no", "use_cpu": False, "debug": False, "gpu_ids": "all", "same_network": True}
    ClusterConfig(num_processes=2, **config).to_yaml_file(str(path))
    argv = tokenizer_arguments(tmp_path / "run", train__steps=2, data__limit=24)
    command = launched([], "-m", "pipelines.train_tokenizer", *argv)
    assert "2 process" in output_of(start(command, HF_HOME=str(tmp_path / "home")))
    assert metrics(tmp_path / "run")[-1]["step"] == 2
