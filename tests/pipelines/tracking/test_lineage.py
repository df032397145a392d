"""Habits of W&B: captions, a table and a summary at the end, what was made from what, and a run's link on the card.

Covers: pipelines/tracking/wandb_run.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from launch import arguments, metrics, output_of, prior_arguments, start, train_prior, train_tokenizer
from servers.wandb_log import wandb_records
from servers.wandb_server import WandbServer

from pipelines import ImagePipeline, encode
from pipelines.tokens import load_tokens
from pipelines.tracking import Mark
from pipelines.tracking.wandb_run import CAPTIONS
from pipelines.training.reporting import conclusion
from tokenizer import Tokenizer

QUICK = {"train__steps": 4, "train__preview_every": 4, "train__evaluate_every": 2, "train__batch_size": 8}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, one_process, tmp_path):
    """One process on the CPU; nobody's folders or keys."""
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def records_of(folder: Path) -> list[Any]:
    """The records of the offline run below a folder."""
    (log,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    return list(wandb_records(log))


def artifacts_in(folder: Path) -> dict[str, tuple[str, bool, str]]:
    """By name: type, whether the run used it (and did not make it), and the digest of its content."""
    found = [record.artifact for record in records_of(folder) if record.WhichOneof("record_type") == "artifact"]
    facts = {each.name: (each.type, each.use_after_commit, each.digest) for each in found}
    return {name: told for name, told in facts.items() if told[0] != "run_table"}  # wandb's own, of a table


def history_in(folder: Path) -> dict[str, Any]:
    """The last value of each name in the history."""
    lines = [record.history for record in records_of(folder) if record.WhichOneof("record_type") == "history"]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for line in lines for item in line.item}


def summary_in(folder: Path) -> dict[str, Any]:
    """What the run's summary was set to."""
    found: dict[str, Any] = {}
    for record in records_of(folder):
        if record.WhichOneof("record_type") == "summary":
            found |= {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.summary.update
            }
    return found


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> Path:
    """A tokenizer, the tokens that it makes, and a prior of these, each with its run of W&B, offline."""
    root = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setenv("WANDB_MODE", "offline")
        train_tokenizer(root / "first", track__wandb="offline", track__artifact=True, data__limit=240, **QUICK)
        data = [f"tokenizer={root}/first/tokenizer", f"out={root}/tokens/digits", "lineage=true"]
        encode.main([*data, *arguments({"data.limit": 240})])
        train_prior(root / "second", root / "tokens" / "digits", track__wandb="offline", track__artifact=True, **QUICK)
    return root


def test_artifacts_of_three_runs_meet_in_one_graph(chain: Path) -> None:
    """What one run has made the next one has used: the same name, type and content."""
    tokenizer = Tokenizer.from_pretrained(chain / "first" / "tokenizer").fingerprint()
    tokens = load_tokens(chain / "tokens" / "digits").digest
    first, encoding, second = (artifacts_in(chain / name) for name in ("first", "tokens", "second"))
    ours, theirs = f"tokenizer-{tokenizer[:12]}", f"tokens-{tokens[:12]}"
    assert set(first) == {ours, "first-tokenizer"} and not first[ours][1]
    assert set(encoding) == {ours, theirs} and encoding[ours][1] and not encoding[theirs][1]
    assert set(second) == {ours, theirs, "second-pipeline"} and second[ours][1] and second[theirs][1]
    assert first[ours][2] == encoding[ours][2] == second[ours][2] and encoding[theirs][2] == second[theirs][2]
    assert first[ours][0] == "tokenizer" and second[theirs][0] == "tokens" and not second["second-pipeline"][1]


def test_pictures_say_what_they_show_and_of_which_step(chain: Path) -> None:
    for run, names in (("first", ("reconstructions", "codebook")), ("second", ("samples",))):
        found = history_in(chain / run)
        for name in names:
            assert found[f"{name}.captions"] == [f"{CAPTIONS[name]}; step 4"]


def test_the_table_and_the_summary_hold_the_best_and_the_last_figures(chain: Path) -> None:
    last = metrics(chain / "first")[-1]
    summary = summary_in(chain / "first")
    assert summary["steps"] == 4 and summary["last/psnr"] == pytest.approx(last["validation/psnr"])
    scores = {line["step"]: line["validation/psnr"] for line in metrics(chain / "first") if "validation/psnr" in line}
    assert summary["best/psnr"] == pytest.approx(max(scores.values()))
    assert scores[summary["best/step"]] == max(scores.values())
    (path,) = chain.glob("first/wandb/offline-run-*/files/media/table/evaluation_*.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["weights", "split", "figure", "value"]
    rows = {(weights, split, figure): value for weights, split, figure, value in table["data"]}
    assert rows["last", "validation", "psnr"] == pytest.approx(last["validation/psnr"])
    held_out = {figure: value for (_, split, figure), value in rows.items() if split == "held_out"}
    assert held_out == pytest.approx({key[9:]: value for key, value in last.items() if key.startswith("held_out/")})


def test_the_best_figures_are_not_the_last_ones() -> None:
    best = {"step": 2, "score": 20.0, "evaluation": {"psnr": 20.0}}
    task = SimpleNamespace(watched="validation")
    training = SimpleNamespace(
        task=task, best=best, evaluation={"psnr": 18.0}, reported={"psnr": 19.0}, step=4, minutes=0.5
    )
    summary, rows = conclusion(training)
    assert summary == {"steps": 4, "minutes": 0.5, "last/psnr": 18.0, "best/psnr": 20.0, "best/step": 2}
    assert rows == [
        ["last", "validation", "psnr", 18.0],
        ["best", "validation", "psnr", 20.0],
        ["left at the end, best", "held_out", "psnr", 19.0],
    ]


def test_nothing_that_is_told_names_a_folder(chain: Path) -> None:
    for run in ("first", "tokens", "second"):
        for record in records_of(chain / run):
            if record.WhichOneof("record_type") == "artifact" and record.artifact.type != "model":
                assert str(chain) not in record.artifact.metadata


def test_a_card_links_no_run_that_is_offline(chain: Path) -> None:
    assert "run_url" not in ImagePipeline.from_pretrained(chain / "second" / "pipeline").provenance["prior"]
    assert "Training runs" not in (chain / "second" / "pipeline" / "README.md").read_text()


def test_encoding_without_the_wish_leaves_no_run(tmp_path: Path, chain: Path) -> None:
    data = [f"tokenizer={chain}/first/tokenizer", f"out={tmp_path}/tokens", *arguments({"data.limit": 40})]
    encode.main(data)
    assert not (tmp_path / "wandb").exists()


def test_a_server_that_is_away_costs_an_encoding_a_line(tmp_path, chain, monkeypatch, capsys) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nanswer")

    monkeypatch.setattr("pipelines.tracking.lineage.start_wandb", refuse)
    data = [f"tokenizer={chain}/first/tokenizer", f"out={tmp_path}/tokens", *arguments({"data.limit": 40})]
    assert encode.main([*data, "lineage=true"]) == tmp_path / "tokens"
    assert "warning: W&B: which tokenizer made these tokens is not noted (no answer)\n" in capsys.readouterr().err
    assert load_tokens(tmp_path / "tokens").class_names


def test_the_wish_to_note_it_makes_no_other_encoding(tmp_path: Path, chain: Path) -> None:
    """An encoding that was killed goes on with or without it."""
    config = encode.EncodeConfig(tokenizer=str(chain / "first" / "tokenizer"), out=str(tmp_path / "tokens"))
    model = Tokenizer.from_pretrained(config.tokenizer)
    noted = config.model_copy(update={"lineage": True})
    assert encode.depends_on(config, model, [], "cpu") == encode.depends_on(noted, model, [], "cpu")


def test_a_mark_is_the_same_whichever_run_makes_it() -> None:
    pytest.importorskip("wandb")
    one, other = (Mark("tokens", "0123456789abcdef", facts).artifact() for facts in ({}, {"rows": 3}))
    assert one.name == other.name == "tokens-0123456789ab" and one.digest == other.digest
    assert Mark("tokens", "1123456789abcdef").artifact().digest != one.digest


PATIENT = """
import sys, time
from pipelines import train_prior
from pipelines.tracking import Tracker

started, evaluate, begin = [], train_prior.PriorTask.evaluate, Tracker.__init__

def noted(self, *given, **named):
    begin(self, *given, **named)
    started.append(self)

def later(*given):
    end = time.monotonic() + 60
    while not started[0].run_url and time.monotonic() < end:
        time.sleep(0.05)
    return evaluate(*given)

Tracker.__init__, train_prior.PriorTask.evaluate = noted, later
train_prior.main(sys.argv[1:])
"""
"""A training whose evaluation, as one of a real run, takes longer than W&B takes to begin."""


@pytest.mark.slow
def test_a_card_links_the_run_of_a_server(tmp_path: Path, chain: Path) -> None:
    """The address, and nothing of this machine's folders."""
    run = tmp_path / "run"
    with WandbServer() as server:
        argv = prior_arguments(run, chain / "tokens" / "digits", track__wandb="online", train__steps=2)
        key = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "x" * 40, "HOME": str(tmp_path)}
        output_of(start([sys.executable, "-c", PATIENT, *argv], **key), seconds=200)
    url = ImagePipeline.from_pretrained(run / "pipeline").provenance["prior"]["run_url"]
    assert url.startswith(f"{server.url}/someone/") and "/runs/" in url
    assert f"Training runs: [prior]({url})." in ModelCard.load(run / "pipeline" / "README.md").text
