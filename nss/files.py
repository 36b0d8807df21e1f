"""Reading and writing that loses nothing: a temporary name first, then a rename; and hashes of what is read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nss.errors import NssError

_TEMPORARY = re.compile(r"\.(.+)\.([^~/]+)~(\d+)\.\w{8}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and rename it to `path` when the block ends without an exception.

    A file or a folder may be written. What was at `path` before stays until then.

    >>> with replacing(Path("a.txt")) as part:
    ...     _ = part.write_text("whole or not at all")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whoever finds it after a kill can tell whether its owner still lives.
    owner = f"{socket.gethostname()}~{os.getpid()}"
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.{owner}.", dir=path.parent))
    try:
        part = holder / path.name
        yield part
        if part.is_dir() and path.exists():
            os.rename(path, holder / "before")
        try:
            os.replace(part, path)
        except BaseException:
            if (holder / "before").exists():
                os.rename(holder / "before", path)
            raise
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def owner_of(path: Path) -> tuple[str, str, int] | None:
    """Return (name it stands for, host, process id) of a temporary folder of `replacing`; None for anything else.

    >>> owner_of(Path("data/.dataset.json.laptop~4711.x3k_9a1q"))
    ('dataset.json', 'laptop', 4711)
    """
    found = _TEMPORARY.fullmatch(path.name)
    return (found[1], found[2], int(found[3])) if found else None


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, keys in the order given, in one rename."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, error: type[NssError] = NssError) -> Any:
    """Read JSON; a missing or damaged file raises `error` naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise unreadable(error, "the file is missing", path) from None
    except OSError as problem:
        raise unreadable(error, f"the file cannot be read ({problem.strerror})", path) from None
    # Numbers of thousands of digits are a ValueError too, and lists in lists without end a RecursionError.
    except (ValueError, RecursionError) as problem:
        raise unreadable(error, f"the file is not JSON ({problem})", path) from None


def file_digest(path: Path) -> str:
    """BLAKE2b digest of a file, 32 hexadecimal characters."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def text_digest(text: str) -> str:
    """BLAKE2b digest of a text, 32 hexadecimal characters."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def unreadable(error: type[NssError], what: str, path: Path) -> NssError:
    """Return the error for a file that is missing or damaged."""
    return error(what, where=str(path), fix="restore it (dvc checkout) or make it again")
