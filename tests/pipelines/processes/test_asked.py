"""The file that `accelerate config` writes is used as it is, and what no run does is refused before images are read."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import write_basic_config
from accelerate.utils.dataclasses import DistributedType
from launch import free_port, metrics, output_of, start, tokenizer_arguments, train_tokenizer

from pipelines.config import UserError
from pipelines.images import tables
from pipelines.processes.launch import REFUSED, require_supported


def launched(home: Path, out: Path) -> str:
    """What `accelerate launch` of a tiny run says, with the settings that lie in `home` and no option of its own."""
    argv = tokenizer_arguments(out, train__steps=2, data__limit=24)
    command = ["accelerate", "launch", "--main_process_port", str(free_port()), "-m", "pipelines.train_tokenizer"]
    return output_of(start([*command, *argv], HF_HOME=str(home)), seconds=200)


@pytest.mark.slow
def test_the_basic_file_of_this_machine_works_unchanged(tmp_path: Path) -> None:
    write_basic_config(save_location=str(tmp_path / "home" / "accelerate" / "default_config.yaml"))
    assert "1 process on" in launched(tmp_path / "home", tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] == 2


@pytest.mark.slow
def test_the_file_for_several_gpus_works_unchanged(tmp_path: Path) -> None:
    """As the dialogue of `accelerate config` writes it for two cards; here they are two processes on the CPU."""
    path = tmp_path / "home" / "accelerate" / "default_config.yaml"
    path.parent.mkdir(parents=True)
    ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type=DistributedType.MULTI_GPU,
        mixed_precision="no",
        use_cpu=False,
        debug=False,
        num_processes=2,
        gpu_ids="all",
        same_network=True,
    ).to_yaml_file(str(path))
    assert "2 processes on" in launched(tmp_path / "home", tmp_path / "run")
    assert metrics(tmp_path / "run")[-1]["step"] == 2


# What is refused


@pytest.mark.parametrize("variable", REFUSED)
def test_what_no_run_does_is_refused_before_images_are_read(variable: str, tmp_path: Path, monkeypatch) -> None:
    def read(*_, **__):
        raise AssertionError("images were read")

    monkeypatch.setenv(variable, "true")
    monkeypatch.setattr(tables, "digits", read)
    with pytest.raises(UserError, match=r"^.* is not supported: use FSDP2, .*--use_fsdp --fsdp_version 2.*$"):
        train_tokenizer(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [{}, {"train__mixed_precision": "bf16"}])
def test_fp8_is_refused_whatever_the_run_asks_for(config: dict, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match=r"^fp8 is not supported: use --mixed_precision bf16"):
        train_tokenizer(tmp_path / "run", **config)


def test_it_is_refused_after_os_environ_was_replaced(monkeypatch) -> None:
    """As `datasets` replaces it, by a copy, after a map in several processes."""
    monkeypatch.setattr(os, "environ", copy.deepcopy(os.environ))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"^DeepSpeed is not supported"):
        require_supported()
