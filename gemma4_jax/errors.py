"""The one exception that means: the input is wrong, and here is how to mend it."""

import difflib
from collections.abc import Iterable

LONGEST = 2000


class UserError(ValueError):
    """A mistake the user can fix; the launcher prints it as one sentence and exits with 1.

    The message says what was wanted, what was found, where, and how to fix it. Raise it for files, directories, configs and
    data; a mistake of the programmer stays a plain `ValueError` or `TypeError` with its traceback.

    Whatever it quotes from a broken file, it prints in at most LONGEST characters, without control characters.
    """

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > LONGEST:
            text = f"{text[: LONGEST - 300]} ... {text[-250:]}"
        return "".join(letter if letter.isprintable() or letter == "\n" else "\ufffd" for letter in text)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? (known: x, y)` for the known name nearest to `name`, else `known: x, y`. Long lists only when needed."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    listed = f"known: {', '.join(known)}"
    if not near:
        return listed
    return f"did you mean {near[0]!r}?" + (f" ({listed})" if len(known) <= 12 else "")


class Preempted(Exception):
    """The run was told to end (SIGTERM) and what it did is saved; the same command goes on from there."""

    exit_code = 75  # sysexits' EX_TEMPFAIL: a scheduler may start the run again

    def __init__(self, step: int):
        super().__init__(f"told to end, and ended after step {step}")
