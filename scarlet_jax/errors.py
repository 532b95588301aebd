"""The one kind of error that a user can cause."""

from __future__ import annotations


class BadInput(ValueError):  # noqa: N818 (it names what happened, not that it is an exception)
    """Something the user gave is wrong: a file, a tensor, a flag or a prompt.

    The message is one line that names the offending thing and says what was expected. Commands print
    it on stderr and exit with 2; library callers catch it as a `ValueError`.
    """
