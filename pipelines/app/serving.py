"""Serve the page on a port, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from PIL import Image

from ..config import UserError
from ..images.decoding import MAX_PIXELS

if TYPE_CHECKING:
    from .served import Served

LOCAL = ("127.0.0.1", "localhost", "[::1]")
EVERYWHERE = ("0.0.0.0", "::")
MEGABYTE = 2**20


def allowed_hosts(host: str) -> list[str]:
    """The names by which the server may be called: a page elsewhere could have its own name lead here, and then read
    what we answer. Where it listens on all addresses nobody knows its names."""
    return ["*"] if host in EVERYWHERE else [f"[{host}]" if ":" in host else host, *LOCAL]


def serve(served: Served, host: str, port: int, queue: int) -> None:
    """Serve until Ctrl-C or SIGTERM, with which the process ends. Raises `UserError` for a port that is taken."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .page import build_page, css, theme

    page = build_page(served, queue)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            max_file_size=int(served.max_upload_mb * MEGABYTE),
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(host))]},
            theme=theme(),
            css=css(served),
            footer_links=[],
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            run_history=False,
            enable_monitoring=False,
        )
    except OSError as error:
        raise UserError(f"port: {port} on {host} cannot be listened on; choose another one") from error
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many, also where gradio decodes
    print(f"{served.name}: {url} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    page.close(verbose=False)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a request may still run, in a daemon thread inside torch, with which Python's own exit aborts
