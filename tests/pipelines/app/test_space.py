"""What `smalti app space=FOLDER` writes: three files that a fresh process can start, and that the Hub takes.

Covers: pipelines/commands/app.py, pipelines/app/space.py.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import httpx
import pytest
import yaml
from command import fails
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


def test_what_is_wrong_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "must be on the Hub" in fails(capsys, "app", f"pipeline={tmp_path}", f"space={tmp_path}/space")
    assert "space: " in fails(capsys, "app", "pipeline=digits", f"space={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    monkeypatch.setattr("pipelines.commands.app.find_spec", lambda name: None)
    assert "smalti[app]" in fails(capsys, "app", "pipeline=digits")
