"""Errors that a user can cause, each saying what was wrong, where, what is allowed and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence


class NssError(Exception):
    """Base of every error a user can cause.

    Parameters
    ----------
    what: what was wrong, one sentence.
    where: the file, key, layer or argument it was found in.
    allowed: what would have been accepted.
    fix: what to do about it.

    >>> print(NssError("the threshold is 1.5", where="slice.threshold", allowed="0 to 1"))
    the threshold is 1.5
      where: slice.threshold
      allowed: 0 to 1
    """

    def __init__(self, what: str, *, where: str = "", allowed: str = "", fix: str = "") -> None:
        self.what, self.where, self.allowed, self.fix = what, where, allowed, fix
        rows = [("where", where), ("allowed", allowed), ("fix", fix)]
        super().__init__("\n".join([what, *(f"  {name}: {text}" for name, text in rows if text)]))


class ProblemsError(NssError):
    """Several problems of one source, listed together so that they can be mended in one go."""

    def __init__(
        self, what: str, problems: Sequence[str] = (), *, where: str = "", allowed: str = "", fix: str = ""
    ) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "\n".join([what, *(f"  - {problem}" for problem in problems)]), where=where, allowed=allowed, fix=fix
        )


class DataError(ProblemsError):
    """A data source or a data folder is not what it should be. Nothing was changed."""


class ParamsError(ProblemsError):
    """params.yaml holds a wrong key, type or value."""


class ModelError(NssError):
    """A model folder or a factory cannot be used."""


class SiteError(NssError):
    """The neurons of a model cannot be found, or a layer or neuron that was named does not exist."""


class ProfileError(NssError):
    """A profile cannot be gathered, merged or read."""


class SliceError(NssError):
    """Critical neurons or semantic slices cannot be computed from what was given."""


class RestructureError(NssError):
    """A model cannot be made as small as asked, or a plan does not fit it."""


class PruneError(NssError):
    """Weights cannot be pruned as asked."""


class ExportError(NssError):
    """A model cannot be exported, or what was exported answers differently."""


class ReadaptError(NssError):
    """A model cannot be re-adapted to the samples that were given."""


class ExtendError(NssError):
    """A model cannot be extended by the classes that were given."""


class StageError(NssError):
    """A pipeline stage failed or cannot run."""


class CrashError(StageError):
    """A stage ended without saying what was wrong: by a fault in code, a signal, or for lack of memory."""


class BusyError(NssError):
    """Somebody else holds the repository."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its kind where it says nothing.

    >>> first_line(OSError("cannot connect"))
    'cannot connect'
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
