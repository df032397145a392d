"""The site of these pages: staged in build/pages, written by Zensical into build/site. `make docs` and `make site`.

    python docs/site/build.py
    python docs/site/build.py serve=8000

A warning, a dead link or a missing picture ends it with exit code 1. Nothing is loaded from another host, so the site
works without a network, from a server or from the files.
"""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import check
import yaml
from staging import ROOT, stage

HERE = Path(__file__).parent
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def build(out: Path, root: Path = ROOT) -> list[str]:
    """Build the site of the repository at `root` into `out`/site; returns what is wrong with it, a line each."""
    pages, site, config = out / "pages", out / "site", out / "site.yml"
    for folder in (pages, site):
        shutil.rmtree(folder, ignore_errors=True)
    pages.mkdir(parents=True)
    navigation = stage(pages, root, out / "notebooks")
    text = (HERE / "site.yml").read_text(encoding="utf-8").replace("ROOT", str(root))
    config.write_text(f"{text}\n{yaml.safe_dump({'nav': navigation}, sort_keys=False)}", encoding="utf-8")
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean", "-f", config]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, root)))}  # for `docstrings.py`, and the code
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, env=env)
    if done.returncode:
        return [told(COLOURS.sub("", done.stdout + done.stderr))]
    return check.problems(site)


def told(text: str) -> str:
    """What Zensical says, without the traceback that follows its own list of issues."""
    return text.partition("Traceback")[0].strip() if "issue" in text.partition("Traceback")[0] else text


def serve(folder: Path, port: int) -> None:
    """Serve the site to this machine until Ctrl-C."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
        print(f"http://127.0.0.1:{server.server_port}/index.html")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


def main(argv: list[str]) -> None:
    """Build, and serve if asked to."""
    port = None
    for word in argv:
        name, _, value = word.partition("=")
        if name != "serve" or not value.isdecimal():
            raise SystemExit(f"error: {word}: expected serve=PORT")
        port = int(value)
    out = ROOT / "build"
    found = build(out)
    if found:
        raise SystemExit("\n".join(found))
    print(f"{out / 'site' / 'index.html'}: {len(list((out / 'site').rglob('*.html')))} pages")
    if port is not None:
        serve(out / "site", port)


if __name__ == "__main__":
    main(sys.argv[1:])
