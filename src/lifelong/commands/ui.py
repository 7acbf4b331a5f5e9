"""``lifelong ui``: the page, served to this machine alone."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from ..config import UsageError, _default, _Int
from .flags import parse

ABOUT = """\
Show what a run or a memory on disk remembers, in a browser on this machine:
look at examples, drop them, forget them, see accuracies while a run goes on.
The address that is printed holds a token; whoever has it can change the memory."""

EXAMPLES = """
examples:
  lifelong ui
  lifelong ui runs/x
  lifelong ui memories/x --port 8700
  lifelong ui runs/x --browser
"""


@dataclass(frozen=True)
class UiFlags:
    """All flags of ``lifelong ui``."""

    place: Annotated[
        Positional[Path | None], arg(metavar="[RUN|STORE]"), _default("the newest run in runs/")
    ] = None
    """A run's folder, made by lifelong run, or a store's, made by lifelong memory import."""
    seed: Annotated[_Int, _default("the only one")] = None
    """Of a run with several seeds: which one's memory."""
    port: Annotated[_Int, _default("a free one")] = None
    """On 127.0.0.1, which other machines do not reach."""
    browser: bool = False
    """Open the page in the browser."""
    json: bool = False
    """Print the address as one JSON object on standard output, and nothing else there."""
    debug: bool = False
    """Show the whole traceback of an error."""


def ui(args: list[str]) -> int:
    """The exit code, once the server is stopped."""
    flags = parse(UiFlags, "lifelong ui", ABOUT, EXAMPLES, args)
    if flags.port is not None and not 0 <= flags.port < 65536:
        raise UsageError(f"--port must be from 0 to 65535, got {flags.port}")
    try:
        import uvicorn

        from .. import app
    except ImportError as error:
        raise ImportError(
            f"lifelong ui needs {error.name}: install it with pip install 'lifelong[ui]'"
        ) from error
    found = app.workspace(newest() if flags.place is None else flags.place, flags.seed)
    with _socket(flags.port) as listening:
        port = listening.getsockname()[1]
        token = app.new_token()
        hosts = frozenset({f"127.0.0.1:{port}", f"localhost:{port}"})
        served = app.make(found, token=token, hosts=hosts)
        address = f"http://127.0.0.1:{port}/?token={token}"
        if flags.json:
            sys.stdout.write(json.dumps({"name": found.name, "address": address}) + "\n")
        else:
            sys.stdout.write(f"{found.name} is shown at\n\n  {address}\n\nCtrl-C ends it.\n")
        sys.stdout.flush()
        if flags.browser:
            import webbrowser

            webbrowser.open(address)
        server = uvicorn.Server(uvicorn.Config(served, log_level="warning", access_log=False))
        with closing(served), suppress(KeyboardInterrupt):
            server.run(sockets=[listening])
    return 0


def newest(folder: Path = Path("runs")) -> Path:
    """The run in ``folder`` that was begun last. Raises UsageError where there is none."""
    begun = [file for file in folder.glob("*/config.json") if file.is_file()]
    if not begun:
        raise UsageError(
            f"there is no run in {folder}/ here; say which one: lifelong ui RUN, or a store's "
            "folder"
        )
    return max(begun, key=lambda file: file.stat().st_mtime).parent


def _socket(port: int | None) -> socket.socket:
    """Bound to this machine alone. Raises UsageError where the port is taken."""
    # Named as TCP, asyncio sends small answers at once; otherwise each waits 40 ms for the next.
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(("127.0.0.1", port or 0))
        found.listen(128)  # whoever comes before the server is up waits for it
    except OSError as error:
        found.close()
        raise UsageError(
            f"--port {port} cannot be used ({error.strerror}); choose another"
        ) from error
    return found
