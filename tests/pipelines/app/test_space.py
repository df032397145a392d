"""What `smalti app space=FOLDER` writes: three files that a fresh process can start, and that the Hub takes.

Covers: pipelines/commands/app.py, pipelines/app/space.py.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import yaml
from optional import needs_digits, needs_gradio
from servers.app_server import ROOT, free_port, running

from pipelines.__main__ import main

pytestmark = needs_gradio


@needs_digits
@pytest.mark.slow  # starts a server: 10 s of a processor
def test_a_fresh_process_serves_it(tmp_path):
    main(["app", "pipeline=digits", f"--space={tmp_path / 'space'}", "max_images=5"])
    port = free_port()
    variables = {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONPATH": str(ROOT)}
    with running([sys.executable, "app.py"], tmp_path / "space", port, **variables) as server:
        found = httpx.get(f"{server.url}config", trust_env=False).json()["components"]
    sliders = [each["props"] for each in found if each["props"].get("label") == "Images"]
    assert [each["maximum"] for each in sliders] == [5]


def test_three_files_say_how_the_hub_runs_it(tmp_path, capsys):
    """Nothing is loaded, so that the pipeline need not be there."""
    main(["app", "pipeline=me/gpt_digits", f"space={tmp_path / 'space'}", "queue=3"])
    assert {path.name for path in (tmp_path / "space").iterdir()} == {"app.py", "requirements.txt", "README.md"}
    _, front, text = (tmp_path / "space" / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio" and card["sdk_version"] == version("gradio") and card["app_file"] == "app.py"
    assert card["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert card["models"] == ["me/gpt_digits"] and "me/gpt_digits" in text
    code = (tmp_path / "space" / "app.py").read_text()
    assert '"pipeline=me/gpt_digits"' in code and '"queue=3"' in code
    compile(code, "app.py", "exec")
    assert (tmp_path / "space" / "requirements.txt").read_text() == f"smalti[app,compress]=={version('smalti')}\n"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (["pipeline={here}", "space={here}/space"], "space: the pipeline must be on the Hub"),
        (["pipeline=digits", "space={here}"], "space: "),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, capsys, keys, problem):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        main(["app", *(key.format(here=tmp_path) for key in keys)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and problem in error and error.count("\n") == 1
    assert [path.name for path in Path(tmp_path).iterdir()] == ["thesis.txt"]


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr("pipelines.commands.app.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["app", "pipeline=digits"])
    assert "smalti[app]" in capsys.readouterr().err
