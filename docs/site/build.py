"""The site of these pages: staged in build/pages, written by Zensical into build/site. `make docs` and `make site`.

    python docs/site/build.py
    python docs/site/build.py serve=8000

A warning or a dead link ends it with exit code 1. The site loads nothing from other hosts, so it works without a
network, from a server or from the files.
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

import yaml
from staging import ROOT, stage

HERE = Path(__file__).parent
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def build(out: Path, root: Path = ROOT) -> list[str]:
    """Build the site of the repository at `root` in `out`/site, and return its problems."""
    pages, config = out / "pages", out / "site.yml"
    shutil.rmtree(pages, ignore_errors=True)
    pages.mkdir(parents=True)
    navigation = yaml.safe_dump({"nav": stage(pages, root, out / "notebooks")}, sort_keys=False)
    text = (HERE / "site.yml").read_text(encoding="utf-8").replace("ROOT", str(root))
    config.write_text(f"{text}\n{navigation}", encoding="utf-8")
    return write(out, root, "--clean")


def write(out: Path, root: Path, *options: str) -> list[str]:
    """Run Zensical on the pages staged in `out`, and return the problems that it reports."""
    site = out / "site"
    shutil.rmtree(site, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "-f", "site.yml", *options]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, root)))}  # for `docstrings.py`, and the code
    done = subprocess.run(command, cwd=out, capture_output=True, text=True, env=env)
    return [issues(COLOURS.sub("", done.stdout + done.stderr))] if done.returncode else []


def issues(text: str) -> str:
    """Return Zensical's list of issues without the traceback that follows it; all of `text` if it lists none."""
    listed = text.partition("Traceback")[0].strip()
    return listed if "issue" in listed else text


def server_of(folder: Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of a folder's files, to this machine alone; port 0 takes any that is free."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)


def serve(folder: Path, port: int) -> None:
    """Serve the site until Ctrl-C."""
    with server_of(folder, port) as server:
        print(f"http://127.0.0.1:{server.server_port}/index.html", flush=True)
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
