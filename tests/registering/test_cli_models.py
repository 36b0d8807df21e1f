"""The commands as users type them, in this process."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from flows import cli
from tasks.champion import read_champion
from tasks.lock import exclusive

Nss = Callable[..., tuple[int, str, str]]


@pytest.fixture
def nss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Nss:
    """Give the function that runs a command in the current folder: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["nss", *arguments])
        capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as end:
            code = end.code or 0
        return (code, *capsys.readouterr())

    return run


def test_promote_pins_what_the_gate_promotes_and_says_so(shop, nss: Nss) -> None:
    shop.cycle()
    code, out, _ = nss("promote")
    assert (code, out.splitlines()[0]) == (0, "the champion is digits version 1 (restructure)")
    assert read_champion(shop.workspace).version == 1
    code, out, _ = nss("promote", "--json")
    assert (code, json.loads(out)["version"]) == (0, 1)


def test_rollback_says_what_changed(two, nss: Nss) -> None:
    code, out, _ = nss("rollback", "--reason", "class 8")
    assert code == 0
    assert out.splitlines()[0] == "the champion is digits version 1 (restructure), in place of version 2"
    assert "  accuracy            0.95   0.9   -0.05" in out.splitlines()
    assert two.ledger("rollback")[0]["reason"] == "class 8"
    content = json.loads(nss("rollback", "--json")[1])
    assert (content["version"], content["was"]) == (2, 1)
    assert content["metrics"]["accuracy"]["change"] == pytest.approx(0.05)


def test_lineage_names_data_commit_and_runs(two, nss: Nss) -> None:
    code, out, _ = nss("lineage")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines() if not line.startswith(" ")] == [
        "digits version 2",
        "digits version 1",
        "not registered",
    ]
    assert two.git("rev-parse", "HEAD").strip() in out
    rows = json.loads(nss("lineage", "digits/1", "--json")[1])
    assert [row["version"] for row in rows] == [1, None]


def test_compare_shows_two_versions_side_by_side(two, nss: Nss) -> None:
    code, out, _ = nss("compare", "previous", "digits@champion")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["digits/1", "digits/2", "change"],
        ["metrics"],
        ["accuracy", "0.9", "0.95", "0.05"],
        ["classes"],
        ["t-shirt", "(top)", "0.45", "0.475", "0.025"],
        ["size"],
        ["macs", "10", "10", "0"],
    ]
    content = json.loads(nss("compare", "1", "2", "--json")[1])
    assert (content["first"]["version"], content["second"]["version"]) == (1, 2)
    assert content["size"]["macs"] == {"first": 10, "second": 10, "change": 0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["promote"], "the gate promotes nothing (HOLD)"),
        (["promote", "restructure"], "--force --reason TEXT promotes it anyway"),
        (["promote", "restructure", "--force"], "--force needs a --reason"),
        (["promote", "restructure", "--force", "--reason", " "], "--force needs a --reason"),
        (["promote", "extend"], "no candidate 'extend'"),
        (["rollback"], "no previous champion"),
        (["lineage"], "there is no version 'champion'"),
        (["compare", "1", "x/2"], "there is no version '1'"),
    ],
)
def test_mistakes_are_two_with_what_to_do_and_nothing_changes(shop, nss: Nss, arguments: list[str], words: str) -> None:
    shop.cycle({"restructure": "HOLD"})
    code, _, err = nss(*arguments)
    assert code == 2
    assert words in " ".join(err.replace("│", "").split())
    assert (shop.versions(), shop.ledger(), read_champion(shop.workspace)) == ([], [], None)


@pytest.mark.parametrize("arguments", [["promote"], ["rollback"], ["lineage"], ["compare", "1", "2"]])
def test_a_store_that_is_away_is_a_mistake_that_is_explained(
    shop, nss: Nss, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    shop.cycle()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    code, _, err = nss(*arguments)
    assert code == 2
    assert err.startswith("error: the tracking store does not answer as it should (")
    assert "  fix: start it" in err
    assert read_champion(shop.workspace) is None


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("postgresql://u:secret@127.0.0.1:9/db", "postgresql://u:***@127.0.0.1:9/db"),
        ("http://u:secret@127.0.0.1:9", "http://u:***@127.0.0.1:9"),
        # Of no kind that MLflow knows: it refuses it, and repeats it.
        ("postgres://u:secret@127.0.0.1:9/db", "postgres://u:***@127.0.0.1:9/db"),
    ],
)
def test_the_password_of_a_store_that_is_away_is_not_printed(
    shop, nss: Nss, monkeypatch: pytest.MonkeyPatch, uri: str, shown: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    code, out, err = nss("lineage")
    assert code == 2
    assert f"  where: {shown}" in err.splitlines()
    assert "secret" not in out + err


def test_an_address_that_is_none_is_a_mistake_that_is_explained(
    shop, nss: Nss, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:abc")
    code, _, err = nss("lineage")
    assert code == 2
    assert err.splitlines()[:2] == [
        "error: this is no address of a tracking store: its host or its port cannot be read",
        "  where: http://localhost:abc",
    ]


@pytest.mark.parametrize("arguments", [["promote"], ["rollback"]])
def test_while_a_cycle_runs_the_champion_cannot_be_changed(two, nss: Nss, arguments: list[str]) -> None:
    with exclusive(two.workspace):
        assert nss(*arguments)[0] == 75
    assert two.aliases() == {"champion": 2, "previous": 1}
