"""A store that fails in the middle is told without the password that its address holds, whoever tells of it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flows import doctor
from nss.errors import StageError
from nss.files import write_json
from tasks.params import load_params
from tasks.pipeline import StageKey
from tasks.recorder import Here
from tasks.registry import store_errors
from tasks.report import log_cycle
from tasks.stage import Record
from tasks.store_address import told
from tasks.tracking import open_tracker
from tasks.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]


class Failing(BaseHTTPRequestHandler):
    """An MLflow server that is healthy, and drops every other request."""

    def do_GET(self) -> None:
        if self.path == "/health":
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"OK")
        else:
            self.close_connection = True

    def do_POST(self) -> None:
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Yield its address as it may be printed; the one that is used holds a password."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    host = f"127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:s3cret@{host}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield f"http://me:***@{host}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    write_json(tmp_path / "champion.json", {"version": None})
    return Workspace(tmp_path)


def stage(workspace: Workspace) -> None:
    record = Record(workspace, load_params(workspace.params), "base", StageKey("base", "", "", ""))
    record.complete()


def cycle(workspace: Workspace) -> None:
    recorder = Here()
    recorder.start(workspace, load_params(workspace.params))
    recorder.call("open", "")
    recorder.end("FINISHED")


def report(workspace: Workspace) -> None:
    assert log_cycle(str(workspace.root), "run") == 1


@pytest.mark.parametrize("work", [stage, cycle, report])
def test_a_store_that_fails_in_the_middle_is_warned_of_without_its_password(
    work: Callable[[Workspace], None], store: str, workspace: Workspace, capfd
) -> None:
    work(workspace)
    err = capfd.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert lines
    assert all(f" (API request to {store}/api/2.0/mlflow/" in line for line in lines), err
    assert "s3cret" not in err


def test_doctor_says_what_to_do_and_no_password(store: str, workspace: Workspace, capfd) -> None:
    found = doctor._run("tracking", lambda: doctor._tracking(workspace))
    assert not found.ok
    start = f"the tracking store does not answer as it should (API request to {store}/api/2.0/mlflow/"
    assert found.found.startswith(start)
    assert found.fix == "start it, or see MLFLOW_TRACKING_URI"
    assert "s3cret" not in found.found + capfd.readouterr().err


def test_doctor_keeps_the_words_of_an_address_that_is_none(workspace: Workspace, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:s3cret@host:port")
    found = doctor._run("tracking", lambda: doctor._tracking(workspace))
    assert found.found == "this is no address of a tracking store: its host or its port cannot be read"
    assert "s3cret" not in found.fix


def test_a_command_that_needs_the_store_ends_with_words_that_hold_no_password(store: str, workspace: Workspace) -> None:
    uri = store.replace("***", "s3cret")
    with pytest.raises(StageError) as caught, store_errors(uri):
        open_tracker(workspace)
    assert f"API request to {store}/api/2.0/mlflow/" in caught.value.what
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("uri", "said", "line"),
    [
        ("http://h:5000", "no answer from http://h:5000/api\nmore", "no answer from http://h:5000/api"),
        ("http://u:pw@h/", "at http://u:pw@h/api (refused)", "at http://u:***@h/api (refused)"),
        # Artifacts: below the host, without the path that the address has.
        ("http://u:pw@h/mlflow/", "404 for url: http://u:pw@h/api/files", "404 for url: http://u:***@h/api/files"),
        # What requests makes of it.
        ("http://u:%70w@h", "for url: http://u:pw@h/api", "for url: http://u:***@h/api"),
        ("http://u:p w@h", "to http://u:p w@h/api: no", "to http://u:***@h/api: no"),
        ("postgresql://h/d?sslpassword=pw", "(postgresql://h/d?sslpassword=pw)", "(postgresql://h/d?sslpassword=***"),
        ("sqlite:////w/t.db", "", "OSError"),
    ],
)
def test_no_spelling_of_the_address_shows_the_password(uri: str, said: str, line: str) -> None:
    assert told(OSError(said), uri) == line


def test_a_stage_goes_on_where_what_it_logs_with_cannot_be_imported(workspace: Workspace, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tasks.tracking", None)
    Record(workspace, load_params(workspace.params), "base", StageKey("base", "", "", ""))
    assert capsys.readouterr().err == (
        "warning: not logged to MLflow (import of tasks.tracking halted; None in sys.modules); "
        "the next `nss run` makes up for it\n"
    )
