"""A page on a port: started with its bounds, and gone with all that it wrote when it ends."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..config import UserError

if TYPE_CHECKING:
    from .served import Served

OFF = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_MCP_SERVER": "False"}
THREADS = 8  # of requests that wait; the pipeline works in one


@contextmanager
def gradio_apart() -> Iterator[Path]:
    """A new folder for what gradio writes, which is removed in the end; nothing is told to anybody meanwhile. Raises
    `UserError` without gradio, which is imported after this."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="smalti-app-") as folder:
        os.environ.update(OFF, GRADIO_TEMP_DIR=folder, GRADIO_CACHE=folder)
        try:
            import_gradio()
            yield Path(folder)
        finally:
            for name in (*OFF, "GRADIO_TEMP_DIR", "GRADIO_CACHE"):
                os.environ.pop(name, None)
                os.environ.update({name: before[name]} if name in before else {})


def import_gradio() -> None:
    """Raise `UserError` without gradio."""
    try:
        import gradio as gradio
    except ImportError as error:
        raise UserError('the app needs the package gradio: pip install "smalti[app]"') from error


def serve(served: Served, host: str, port: int) -> None:
    """Serve until Ctrl-C, or the end of the process is asked for. Raises `UserError` for a port that is taken."""
    from starlette.middleware import Middleware

    from .bounds import LOCAL, Gate
    from .elements import code
    from .page import build_page, theme

    page = build_page(served)
    gate = Middleware(Gate, max_body=served.bounds.max_body, hosts=LOCAL if host in LOCAL else ())
    options: dict[str, Any] = {"theme": theme(), "css": code("page.css"), "footer_links": [], "run_history": False}
    options |= {"enable_monitoring": False, "pwa": False, "ssr_mode": False, "mcp_server": False, "share": False}
    ended = threading.Event()
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            max_threads=THREADS,
            max_file_size=1,
            state_session_capacity=100,
            app_kwargs={"middleware": [gate]},
            **options,
        )
    except OSError as error:
        raise UserError(f"port: {port} on {host} cannot be listened on; choose another one") from error
    print(f"{served.name}: {url} (Ctrl-C ends it)", flush=True)
    with ending(ended):
        ended.wait()
    page.close(verbose=False)


@contextmanager
def ending(ended: threading.Event) -> Iterator[None]:
    """Set `ended` at Ctrl-C and where the process is asked to end, instead of dying at once."""

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
