"""The samples that a command is asked for: ``--indices 0:100``, ``3,5,8``, or a file."""

from __future__ import annotations

import re
from pathlib import Path

from verideq.errors import DataError

_FORMS = "write a:b (b excluded), a list such as 3,5,8, or the path of a text file with one index a line"
# 18 digits hold any index, and keep int() fast on whatever was typed.
_NUMBER = re.compile(r"[0-9]{1,18}")
_RANGE = re.compile(r"([0-9]{0,18}):([0-9]{0,18})")


def parse_indices(text: str, n: int) -> list[int]:
    """Indices of samples, in the order given.

    Args:
        text: numbers and ranges ``a:b`` (either end may be left out) separated by commas, or the path of a text file
            with one index a line; text of digits and ``:,-`` alone is never taken for a path (write ``./100``).
        n: the number of samples.

    Raises:
        DataError: not an index, an index outside ``0 .. n - 1``, one given twice, or none at all.

    >>> parse_indices("8,0:3", 10)
    [8, 0, 1, 2]
    """
    if re.fullmatch(r"[0-9:,\-+ ]+", text):
        where, entries = f"indices {text!r}", text.split(",")
    else:
        where, entries = f"index file {text!r}", _lines(text)
    chosen: dict[int, None] = {}
    for entry in entries:
        for index in _expand(entry.strip(), n, where):
            if index in chosen:
                raise DataError(f"{where}: index {index} is given twice; give each sample once")
            chosen[index] = None
    if not chosen:
        raise DataError(f"{where}: no sample is selected; {_FORMS}")
    return list(chosen)


def _lines(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"indices {path!r} are no list and no readable file ({error}); {_FORMS}") from None
    entries = [line.strip() for line in lines if line.strip()]
    for entry in entries:
        if not _NUMBER.fullmatch(entry):
            raise DataError(f"index file {path!r}: {entry[:40]!r} is not an index; write one integer a line, 0 or more")
    return entries


def _expand(entry: str, n: int, where: str) -> range:
    if span := _RANGE.fullmatch(entry):
        start, stop = int(span[1] or 0), int(span[2] or n)
    elif _NUMBER.fullmatch(entry):
        start, stop = int(entry), int(entry) + 1
    else:
        raise DataError(f"{where}: {entry!r} is not an index; {_FORMS}")
    if start >= n or stop > n:
        raise DataError(f"{where}: {entry!r} is out of range; there are {n} samples, 0 to {n - 1}")
    if start >= stop:
        raise DataError(f"{where}: {entry!r} selects no sample; {_FORMS}")
    return range(start, stop)
