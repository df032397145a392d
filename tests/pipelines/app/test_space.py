"""What `smalti app space=owner/name` writes: a folder that a fresh process can start, and that the Hub takes.

Covers: pipelines/commands/app.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from optional import needs_gradio
from servers.app_server import Driver, free_port, running
from servers.chromium import CHROMIUM, browser
from servers.fake_hub import run_client, serve
from small_pipelines import make_pipeline

from pipelines import ImagePipeline
from pipelines.__main__ import main
from pipelines.saving import variant_of
from tokenizer.files import hash_file, write_json

pytestmark = needs_gradio


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A pipeline that was trained on a folder of this machine."""
    folder = tmp_path_factory.mktemp("space")
    torch.manual_seed(0)
    pipe = make_pipeline(size=(8, 8))
    (folder / "my photos").mkdir()
    pipe.provenance = {"data": {"source": str(folder / "my photos"), "image_size": 8}}
    pipe.save_pretrained(folder / "pipeline")
    return folder


@pytest.fixture(scope="module")
def space(place):
    """A Space that carries its pipeline and the code; the keys are written as the Hub's people write options."""
    keys = [f"pipeline={place / 'pipeline'}", "--space=me/digits", f"--out={place / 'space'}", "max_images=5"]
    main(["app", *keys, "max_upload_mb=2", "queue=3"])
    return place / "space"


def test_the_card_tells_the_hub_how_to_run_it(space):
    _, front, text = (space / "README.md").read_text().split("---\n", 2)
    told = yaml.safe_load(front)
    assert told["sdk"] == "gradio" and told["sdk_version"] == version("gradio") and told["app_file"] == "app.py"
    assert told["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert told["title"] == "digits" and "models" not in told and "8 x 8 pixels" in text
    needed = (space / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("torch>=") for line in needed) and not any(";" in line for line in needed)


def test_nothing_of_this_machine_is_carried(space, place):
    assert ImagePipeline.from_pretrained(space / "pipeline").labels == ["cat", "dog", "eel"]
    text = [path.read_text() for path in space.rglob("*") if path.suffix in (".json", ".md", ".txt")]
    text.append((space / "app.py").read_text())
    assert not [part for part in text if str(place) in part or "my photos" in part]
    assert not list(space.rglob("__pycache__")) and (space / "pipelines" / "app" / "browser" / "page.css").is_file()


def test_weights_of_lower_precision_stay_so(place, tmp_path):
    ImagePipeline.from_pretrained(place / "pipeline").save_pretrained(tmp_path / "half", variant="fp16")
    main(["app", f"pipeline={tmp_path / 'half'}", "space=me/half", f"out={tmp_path / 'space'}"])
    whole, half = place / "pipeline", tmp_path / "space/pipeline"
    sizes = [sum(path.stat().st_size for path in root.rglob("*.safetensors")) for root in (whole, half)]
    assert variant_of(half) == "fp16" and sizes[1] < 0.7 * sizes[0]


@pytest.mark.slow  # starts twice: 20 s of a processor
def test_a_fresh_process_serves_it(space, tmp_path):
    """By its own code, as on the Hub: nothing else of Smalti is on the path."""
    port = free_port()
    told = {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "PYTHONPATH": ""}
    with running([sys.executable, str(space / "app.py")], tmp_path, port, **told) as server:
        found = subprocess.run(
            [sys.executable, "-c", "import pipelines; print(pipelines.__file__)"],
            cwd=space,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": ""},
        )
        assert Path(found.stdout.strip()).is_relative_to(space)
        if CHROMIUM is not None:
            with browser() as chromium:
                driver = Driver(chromium.new_page(), server.url)
                driver.number("number input for Images", 3)
                driver.click("Sample")
                driver.wait("#samples figure >> nth=2")
                assert driver.page.get_by_label("number input for Images").first.get_attribute("max") == "5"
                assert "from_pretrained('pipeline')" in driver.page.locator(".cm-content").first.inner_text()
                assert not driver.problems


def test_a_pipeline_on_the_hub_is_named_and_code_may_be_installed(place, tmp_path, monkeypatch):
    from pipelines.commands import app as verb

    pipe = ImagePipeline.from_pretrained(place / "pipeline")
    monkeypatch.setattr(verb.ImagePipeline, "from_pretrained", lambda source, device=None: pipe)
    keys = ["pipeline=me/gpt_digits", "space=me/digits", f"out={tmp_path / 'space'}", "requirement=smalti[app]==0.2.0"]
    main(["app", *keys])
    assert '"pipeline=me/gpt_digits"' in (tmp_path / "space" / "app.py").read_text()
    assert "- me/gpt_digits" in (tmp_path / "space" / "README.md").read_text()
    assert (tmp_path / "space" / "requirements.txt").read_text().startswith("smalti[app]==0.2.0\n")
    names = {path.name for path in (tmp_path / "space").iterdir()}
    assert names == {"app.py", "requirements.txt", "README.md", "manifest.json"}


@pytest.mark.slow
def test_a_space_is_uploaded_in_one_commit_that_removes_what_is_old(place, tmp_path):
    old = tmp_path / "hub" / "spaces" / "me" / "digits" / "main"
    (old / "pipelines").mkdir(parents=True)
    for name in ("pipelines/gone.py", "notes.txt", ".gitattributes"):
        (old / name).write_text("old")
    listed = {"pipelines/gone.py": {"sha256": hash_file(old / "pipelines" / "gone.py"), "size": 3}}
    write_json(old / "manifest.json", {"files": listed})
    with serve(tmp_path / "hub") as hub:
        told = run_client(__file__, hub, tmp_path / "home", str(place / "pipeline"), str(tmp_path / "out"))
    assert told == f"{hub.url}/spaces/me/digits"
    (created,) = hub.created
    assert created["type"] == "space" and created["sdk"] == "gradio"
    assert created.get("private") is True or created.get("visibility") == "private"
    (commit,) = hub.commits
    assert commit["repository"] == "spaces/me/digits" and commit["deleted"] == ["pipelines/gone.py"]
    written = {path.relative_to(old).as_posix() for path in old.rglob("*") if path.is_file()}
    assert {"app.py", "README.md", "requirements.txt", "notes.txt", "pipeline/model_index.json"} < written
    assert "pipelines/gone.py" not in written


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (["space=digits"], "space: expected a Hub id of the form owner/name (got 'digits')"),
        (["push=true"], "push, requirement: belong to a space; give space=owner/name"),
        (["requirement=smalti"], "push, requirement: belong to a space; give space=owner/name"),
        (["max_images=0"], "max_images: must be >= 1 (got 0)"),
        (["max_upload_mb=0"], "max_upload_mb: must be > 0 (got 0)"),
        (["queue=0"], "queue: must be >= 1 (got 0)"),
        (["port=70000"], "port: must be <= 65535 (got 70000)"),
        (
            ["space=me/digits", "push=true"],
            "space: me/digits cannot be written to: HF_HUB_OFFLINE forbids asking the Hub",
        ),
    ],
)
def test_what_is_wrong_is_told_in_a_line(place, capsys, keys, problem, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(["app", f"pipeline={place / 'pipeline'}", f"out={tmp_path / 'space'}", *keys])
    assert caught.value.code == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "space").exists()


def test_a_folder_that_holds_something_is_not_written(place, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["app", f"pipeline={place / 'pipeline'}", "space=me/digits", f"out={tmp_path}"])
    assert "error: out:" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_port_that_is_taken(place, capsys):
    before = dict(os.environ)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as caught:
            main(["app", f"pipeline={place / 'pipeline'}", f"port={port}"])
    changed = {name for name in {*before, *os.environ} if before.get(name) != os.environ.get(name)}
    assert changed <= {"TORCHINDUCTOR_CACHE_DIR"}, "what torch sets, where this is the first to import it"
    assert caught.value.code == 2 and "GRADIO_TEMP_DIR" not in before
    assert f"error: port: {port} on 127.0.0.1 cannot be listened on" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as caught:
        main(["app", f"pipeline={place / 'pipeline'}"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == 'error: the app needs the package gradio: pip install "smalti[app]"\n'


def client(pipeline: str, out: str) -> None:
    """Upload, in a process that takes the Hub on this machine for the Hub; prints the last line that was printed."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(["app", f"pipeline={pipeline}", "space=me/digits", f"out={out}", "push=true"])
    print(json.dumps(said.getvalue().splitlines()[-1]))


if __name__ == "__main__":
    client(*sys.argv[1:])
