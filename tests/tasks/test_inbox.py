from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nss.data import load_data
from nss.errors import BusyError, DataError
from tasks import inbox as module
from tasks.data import add, add_all
from tasks.inbox import Inbox, take
from tasks.lock import exclusive, is_held
from tasks.provenance import data_md5
from tasks.workspace import Workspace


@pytest.fixture
def workspace(repository: Path, tmp_path: Path) -> Workspace:
    """A workspace with one batch of two classes in it."""
    (repository / "inbox").mkdir()
    found = Workspace(repository)
    add(found, str(images(tmp_path / "first.npz", 0)), new_classes=True)
    return found


def images(path: Path, seed: int, classes: int = 2) -> Path:
    """Write 20 images whose pixels are drawn with that seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    np.savez(path, x=pixels, y=np.arange(20) % classes)
    return path


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []


def look(inbox: Inbox) -> list[str]:
    return [entry.name for entry in inbox.settled()]


def test_three_entries_become_three_batches_of_one_version(workspace: Workspace, monkeypatch) -> None:
    folder, calls = workspace.root / "inbox", []
    commit = module.add_all.__globals__["Pipeline"].add_data
    monkeypatch.setattr("tasks.data.Pipeline.add_data", lambda self: (calls.append(1), commit(self)))
    entries = [images(folder / f"{name}.npz", seed) for seed, name in enumerate("abc", start=1)]
    before = data_md5(workspace)
    taken = take(workspace, entries)
    assert [each.name for each in taken.arrived] == ["a.npz", "b.npz", "c.npz"]
    assert taken.refused == ()
    assert len(calls) == 1
    assert taken.data_md5 == data_md5(workspace) != before
    known = [batch.digest for batch in load_data(workspace.data).batches]
    assert known[1:] == [each.digest for each in taken.arrived]
    assert names(folder) == [".done"]
    assert [name.split("-", 2)[2] for name in names(folder / ".done")] == ["a.npz", "b.npz", "c.npz"]


def test_the_same_batch_again_makes_no_new_version(workspace: Workspace) -> None:
    folder = workspace.root / "inbox"
    first = take(workspace, [images(folder / "a.npz", 1)])
    again = take(workspace, [images(folder / "a.npz", 1)])
    assert again.data_md5 == first.data_md5
    assert [each.already_present for each in (*first.arrived, *again.arrived)] == [False, True]
    assert len(names(folder / ".done")) == 2


def test_a_bad_entry_is_put_aside_with_its_problems_and_the_good_one_taken(workspace: Workspace) -> None:
    folder = workspace.root / "inbox"
    (folder / "bad" / "0").mkdir(parents=True)
    (folder / "bad" / "0" / "empty.png").write_bytes(b"")
    (folder / "bad" / "1").mkdir()
    taken = take(workspace, [folder / "bad", images(folder / "good.npz", 1)])
    (refused,) = taken.refused
    assert [each.name for each in taken.arrived] == ["good.npz"]
    assert (folder / ".rejected" / "bad" / "0" / "empty.png").is_file()
    assert refused.place == str(folder / ".rejected" / "bad")
    text = (folder / ".rejected" / "bad.problems.txt").read_text()
    assert text.splitlines() == list(refused.problems)
    assert "0/empty.png" in text
    assert "1: a class folder without images" in text
    assert len(load_data(workspace.data).batches) == 2


@pytest.mark.parametrize("name", ["notes.txt", "torn.npz"])
def test_what_is_no_source_at_all_is_put_aside_and_says_why(workspace: Workspace, name: str) -> None:
    entry = workspace.root / "inbox" / name
    entry.write_bytes(b"not images")
    before = {path: path.read_bytes() for path in workspace.data.rglob("*") if path.is_file()}
    md5 = data_md5(workspace)
    taken = take(workspace, [entry])
    assert [each.name for each in taken.refused] == [name]
    assert taken.data_md5 == md5
    assert {path: path.read_bytes() for path in workspace.data.rglob("*") if path.is_file()} == before
    text = (entry.parent / ".rejected" / f"{name}.problems.txt").read_text()
    assert text.splitlines() == list(taken.refused[0].problems)
    assert "\nfix: " in text
    assert ("\nallowed: " in text) is (name == "notes.txt")


def test_two_refused_entries_of_one_name_are_both_kept(workspace: Workspace) -> None:
    entry = workspace.root / "inbox" / "notes.txt"
    for text in ("one", "two"):
        entry.write_text(text)
        take(workspace, [entry])
    folder = entry.parent / ".rejected"
    assert names(folder) == ["notes.txt", "notes.txt-2", "notes.txt-2.problems.txt", "notes.txt.problems.txt"]
    assert (folder / "notes.txt-2").read_text() == "two"


def test_new_classes_and_another_size_are_taken_when_allowed(workspace: Workspace, tmp_path: Path) -> None:
    folder = workspace.root / "inbox"
    assert take(workspace, [images(folder / "a.npz", 1, classes=3)]).refused
    assert take(workspace, [images(folder / "a.npz", 1, classes=3)], new_classes=True).arrived
    np.savez(
        folder / "b.npz", x=np.zeros((4, 16, 16), np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None], y=[0] * 4
    )
    assert take(workspace, [folder / "b.npz"], resize=(8, 8)).arrived
    assert load_data(workspace.data).image_shape == (1, 8, 8)


@pytest.mark.parametrize("step", ["add_data", "rename"])
def test_killed_between_two_steps_the_next_take_completes_it(workspace: Workspace, step: str, monkeypatch) -> None:
    entry = images(workspace.root / "inbox" / "a.npz", 1)
    before = data_md5(workspace)
    with monkeypatch.context() as patch:
        place = {"add_data": "tasks.data.Pipeline.add_data", "rename": "pathlib.Path.rename"}[step]
        patch.setattr(place, killed)
        with pytest.raises(KeyboardInterrupt):
            take(workspace, [entry])
    assert entry.exists()
    assert (data_md5(workspace) == before) == (step == "add_data")
    taken = take(workspace, [entry])
    assert [each.already_present for each in taken.arrived] == [True]
    assert taken.data_md5 != before
    assert len(load_data(workspace.data).batches) == 2
    assert names(entry.parent) == [".done"]


def killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_what_replaces_an_entry_while_it_is_read_stays_and_is_taken_next(workspace: Workspace, monkeypatch) -> None:
    entry, real = images(workspace.root / "inbox" / "a.npz", 1), module.add_all

    def slowly(*arguments: object, **options: object) -> list[object]:
        done = real(*arguments, **options)
        images(entry, 2)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(module, "add_all", slowly)
        first = take(workspace, [entry])
    assert (first.arrived, first.refused) == ((), ())
    assert names(entry.parent) == ["a.npz"]
    second = take(workspace, [entry])
    assert [each.already_present for each in second.arrived] == [False]
    assert [len(batch) for batch in load_data(workspace.data).batches] == [20, 20, 20]
    assert names(entry.parent) == [".done"]


def test_a_bad_entry_that_is_mended_while_it_is_read_is_not_put_aside(workspace: Workspace, monkeypatch) -> None:
    entry, real = workspace.root / "inbox" / "a.npz", module.add_all
    entry.write_bytes(b"half")

    def slowly(*arguments: object, **options: object) -> list[object]:
        done = real(*arguments, **options)
        images(entry, 1)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(module, "add_all", slowly)
        assert take(workspace, [entry]).refused == ()
    assert len(take(workspace, [entry]).arrived) == 1
    assert names(entry.parent) == [".done"]


@pytest.mark.parametrize("when", ["before", "while it reads"])
def test_an_entry_that_another_watcher_took_is_no_mistake(workspace: Workspace, monkeypatch, when: str) -> None:
    entry, real = images(workspace.root / "inbox" / "a.npz", 1), module.add_all

    def late(*arguments: object, **options: object) -> list[object]:
        with monkeypatch.context() as patch:
            patch.setattr(module, "add_all", real)
            take(workspace, [entry])
        return real(*arguments, **options)

    if when == "before":
        take(workspace, [entry])
    else:
        monkeypatch.setattr(module, "add_all", late)
    taken = take(workspace, [entry])
    assert (taken.arrived, taken.refused) == ((), ())
    assert names(entry.parent) == [".done"]


def test_the_problems_lie_beside_an_entry_before_it_is_put_aside(workspace: Workspace, monkeypatch) -> None:
    entry = workspace.root / "inbox" / "notes.txt"
    entry.write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.rename", killed)
        with pytest.raises(KeyboardInterrupt):
            take(workspace, [entry])
    assert names(entry.parent / ".rejected") == ["notes.txt.problems.txt"]
    take(workspace, [entry])
    assert names(entry.parent / ".rejected") == ["notes.txt", "notes.txt.problems.txt"]


def test_a_full_disk_while_an_entry_is_put_aside_is_said(workspace: Workspace, monkeypatch) -> None:
    entry, write = workspace.root / "inbox" / "notes.txt", Path.write_text
    entry.write_text("x")

    def full(path: Path, *arguments: object, **options: object) -> int:
        if path.name.endswith(".problems.txt"):
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        taken = take(workspace, [entry])
    assert (taken.refused, taken.stuck) == ((), ("notes.txt: No space left on device",))
    assert [each.name for each in take(workspace, [entry]).refused] == ["notes.txt"]


def test_a_folder_whose_class_folders_are_all_links_is_taken(workspace: Workspace) -> None:
    entry = workspace.root / "inbox" / "batch"
    for label in ("0", "1"):
        (entry / ".images" / label).mkdir(parents=True)
        pixels = np.random.default_rng(int(label)).integers(0, 255, (8, 8), dtype=np.uint8)
        Image.fromarray(pixels).save(entry / ".images" / label / "0.png")
        (entry / label).symlink_to(Path(".images") / label)
    assert look(Inbox(entry.parent, 0)) == ["batch"]
    (arrived,) = take(workspace, [entry]).arrived
    assert arrived.images == 2


def test_a_link_that_leads_nowhere_is_put_aside(workspace: Workspace) -> None:
    entry = workspace.root / "inbox" / "a.npz"
    entry.symlink_to("nowhere.npz")
    box = Inbox(entry.parent, 0)
    assert look(box) == ["a.npz"]
    for _ in range(2):
        entry.is_symlink() or entry.symlink_to("nowhere.npz")
        (refused,) = take(workspace, [entry]).refused
        assert refused.problems == (
            "the source does not exist",
            "allowed: a folder of class folders, an .npz, a folder of idx files, fashion-mnist, or torchvision:NAME",
            "fix: name one of these",
        )
    assert look(box) == []
    assert names(entry.parent / ".rejected")[:2] == ["a.npz", "a.npz-2"]


def test_damaged_data_is_not_blamed_on_what_arrives(workspace: Workspace) -> None:
    entry = images(workspace.root / "inbox" / "a.npz", 1)
    (workspace.data / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json|JSON"):
        take(workspace, [entry])
    assert names(entry.parent) == ["a.npz"]


def test_missing_data_is_restored_before_a_batch_is_added(workspace: Workspace) -> None:
    for path in sorted(workspace.data.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    workspace.data.rmdir()
    take(workspace, [images(workspace.root / "inbox" / "a.npz", 1)])
    assert len(load_data(workspace.data).batches) == 2


def test_data_that_cannot_be_restored_is_not_replaced_by_what_arrives(tmp_path: Path, workspace: Workspace) -> None:
    pointer = (workspace.root / "data.dvc").read_text()
    fresh = tmp_path / "fresh"
    (fresh / ".dvc").mkdir(parents=True)
    (fresh / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
    subprocess.run(["git", "init", "-q"], cwd=fresh, check=True)
    (fresh / "data.dvc").write_text(pointer)
    entry = images(fresh / "inbox" / "a.npz", 1)
    with pytest.raises(DataError, match="whose files are not here"):
        take(Workspace(fresh), [entry])
    assert (fresh / "data.dvc").read_text() == pointer
    assert entry.exists()
    assert not (fresh / "data").exists()


def test_what_cannot_be_moved_is_said_and_does_not_keep_the_others(workspace: Workspace, monkeypatch) -> None:
    entries = [images(workspace.root / "inbox" / f"{name}.npz", seed) for seed, name in enumerate("ab", start=1)]
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "a.npz":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    before = data_md5(workspace)
    taken = take(workspace, entries)
    assert taken.stuck == ("a.npz: Permission denied",)
    assert [each.name for each in taken.arrived] == ["a.npz", "b.npz"]
    assert taken.data_md5 == data_md5(workspace) != before
    # It is found again, and told as arrived no second time.
    again = take(workspace, entries[:1])
    assert (again.arrived, again.stuck) == ((), ("a.npz: Permission denied",))
    monkeypatch.setattr("pathlib.Path.rename", rename)
    last = take(workspace, entries[:1])
    assert ([each.already_present for each in last.arrived], last.stuck) == ([True], ())
    assert last.data_md5 == taken.data_md5


@pytest.mark.parametrize("stem", ["x" * 251, "ä" * 125 + "x", "x" + "ä" * 125])
def test_a_name_as_long_as_the_file_system_allows_is_cut_where_it_is_put(workspace: Workspace, stem: str) -> None:
    folder = workspace.root / "inbox"
    for seed in (1, 1):
        taken = take(workspace, [images(folder / f"{stem}.npz", seed)])
        assert ([each.name for each in taken.arrived], taken.stuck) == ([f"{stem}.npz"], ())
    for _ in range(2):
        (folder / f"{stem}.txt").write_text("no images")
        assert take(workspace, [folder / f"{stem}.txt"]).stuck == ()
    assert names(folder) == [".done", ".rejected"]
    done = stem.encode()[: 237 - len("20260101-120000-.npz")].decode(errors="ignore")
    assert [name[16:].removesuffix("-2") for name in names(folder / ".done")] == [f"{done}.npz"] * 2
    aside = stem.encode()[: 237 - len(".txt")].decode(errors="ignore")
    endings = (".txt", ".txt-2", ".txt-2.problems.txt", ".txt.problems.txt")
    assert names(folder / ".rejected") == [f"{aside}{ending}" for ending in endings]


def test_names_that_are_no_text_are_taken_and_their_problems_written_down(workspace: Workspace) -> None:
    folder = workspace.root / "inbox"
    good = images(folder / "a.npz", 1).rename(folder / os.fsdecode(b"caf\xe9.npz"))
    for name in (b"train/0", b"test/1", b"caf\xe9"):
        (folder / "bad" / os.fsdecode(name)).mkdir(parents=True)
    (folder / "bad" / "train" / "0" / "empty.png").write_bytes(b"")
    taken = take(workspace, [good, folder / "bad"])
    assert ([each.name for each in taken.arrived], taken.stuck) == ([good.name], ())
    text = (folder / ".rejected" / "bad.problems.txt").read_text(encoding="utf-8")
    assert text.startswith("caf\\udce9: an unknown split; ")


def test_nothing_is_added_while_a_cycle_runs(workspace: Workspace) -> None:
    entry = images(workspace.root / "inbox" / "a.npz", 1)
    held, done = threading.Event(), threading.Event()

    def cycle() -> None:
        with exclusive(workspace):
            held.set()
            done.wait(30)

    thread = threading.Thread(target=cycle)
    thread.start()
    held.wait(30)
    assert is_held(workspace)
    with pytest.raises(BusyError, match=rf"process {os.getpid()} \(.+\) is at work in this workspace"):
        take(workspace, [entry])
    done.set()
    thread.join()
    assert not is_held(workspace)
    assert entry.exists()
    assert len(load_data(workspace.data).batches) == 1


def test_somebody_else_is_waited_for_when_asked(workspace: Workspace) -> None:
    held = threading.Event()

    def cycle() -> None:
        with exclusive(workspace):
            held.set()
            threading.Event().wait(0.3)

    thread = threading.Thread(target=cycle)
    thread.start()
    held.wait(30)
    with exclusive(workspace, wait_s=30):
        assert is_held(workspace)
    thread.join()


def test_a_list_of_sources_keeps_its_order(workspace: Workspace, tmp_path: Path) -> None:
    done = add_all(workspace, [images(tmp_path / "a.npz", 1), tmp_path / "missing", images(tmp_path / "b.npz", 2)])
    assert [isinstance(each, DataError) for each in done] == [False, True, False]
