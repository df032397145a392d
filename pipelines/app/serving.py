"""Serve the page until Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from ..config import UserError
from ..images.formats import MAX_PIXELS

if TYPE_CHECKING:
    from .served import Served

LOCAL = ("127.0.0.1", "localhost", "[::1]")
EVERYWHERE = ("0.0.0.0", "::")
MEGABYTE = 2**20


def allowed_hosts(host: str) -> list[str]:
    """Return the accepted Host headers, as a protection against DNS rebinding: another site could point its own name to
    this machine and read our answers. When listening on all addresses, the names are unknown and all are accepted."""
    return ["*"] if host in EVERYWHERE else [f"[{host}]" if ":" in host else host, *LOCAL]


def serve(served: Sequence[Served], host: str, port: int, queue: int) -> None:
    """Serve until Ctrl-C or SIGTERM, which end the process. Raises `UserError` if the port is in use."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from .page import build_page, make_css, make_theme

    page = build_page(served, queue)
    try:
        _, url, _ = page.launch(
            server_name=host,
            server_port=port,
            max_file_size=int(max(each.max_upload_mb for each in served) * MEGABYTE),
            app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts(host))]},
            theme=make_theme(),
            css=make_css(served),
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
        raise UserError(f"port: cannot listen on port {port} of {host}; choose another port") from error
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses images of twice this size, also when gradio decodes them
    names = ", ".join(each.name for each in served)
    print(f"{names}: {url} (Ctrl-C to stop)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    page.close(verbose=False)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # skip Python's exit, which aborts if a daemon thread is still running inside torch
