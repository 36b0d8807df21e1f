"""Getting Prefect ready for a run on a terminal: quiet, and its temporary server starting while we import the rest.

A flow without PREFECT_API_URL starts such a server itself, but only after importing the server's code into this process
too, and after everything else. Started first and beside, it saves three of eleven seconds of a run that does nothing
(two cores, measured).
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from typing import ClassVar

_HOST = "127.0.0.1"
_PATIENCE_S = 120


class Server:
    """The Prefect server of this run: the one that PREFECT_API_URL names, or a temporary one that ends with us.

    >>> server = Server.prepare()  # doctest: +SKIP
    >>> server.wait()  # doctest: +SKIP
    """

    # PREFECT_API_URL names it to all that comes later in this process.
    _own: ClassVar[Server | None] = None

    def __init__(self, process: subprocess.Popen[bytes] | None = None, url: str = "") -> None:
        self.process, self.url = process, url

    @property
    def is_temporary(self) -> bool:
        """Whether nobody can look at it after the run."""
        return self.process is not None

    @property
    def is_alive(self) -> bool:
        """Whether it is a temporary one that has not ended."""
        return self.process is not None and self.process.poll() is None

    @classmethod
    def prepare(cls) -> Server:
        """Keep Prefect's log off the terminal and start a temporary server unless the user has one, or it lives."""
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
        from prefect.context import refresh_global_settings_context
        from prefect.settings import PREFECT_API_URL

        named, own = PREFECT_API_URL.value(), cls._own
        if named and (own is None or named != own.url):
            return cls()
        if named and own and own.is_alive:
            return own
        cls._own = server = cls.start()
        os.environ["PREFECT_API_URL"] = server.url
        refresh_global_settings_context()
        return server

    @classmethod
    def start(cls) -> Server:
        """Start a temporary server that ends with this process."""
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            port = probe.getsockname()[1]
        server = cls(_spawn(port), f"http://{_HOST}:{port}/api")
        atexit.register(server.stop)
        return server

    def wait(self) -> None:
        """Return when the server answers. Raises NssError when it does not: a temporary one within two minutes."""
        if self.process is None:
            from flows.deployment import require_answer

            return require_answer()
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and self.is_alive:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        from nss.errors import NssError

        raise NssError(
            "Prefect's temporary server did not start",
            where=self.url,
            fix="start one yourself with `prefect server start` and set PREFECT_API_URL; it says what is wrong",
        )

    def stop(self) -> None:
        """End the temporary server."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()


def _serve(port: int) -> None:
    """Be the temporary server, until told to stop or the process that started us is gone, in whatever way."""
    import threading

    import uvicorn

    threading.Thread(target=_end_with_parent, daemon=True).start()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, host=_HOST, port=port, log_level="error")


def _end_with_parent() -> None:
    # The other end of this pipe is open as long as that process lives.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _spawn(port: int) -> subprocess.Popen[bytes]:
    """Start what prefect.server.api.server.SubprocessASGIServer would."""
    switches = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    # Of its own session, so that Ctrl-C on the terminal leaves it up until the flow has recorded how it ended.
    # -P: nothing in the folder of this file or in the current one hides an installed package.
    return subprocess.Popen(
        [sys.executable, "-P", __file__, str(port)],
        env={**os.environ, **switches},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
