"""What the operating system refuses of the paths that a user gave, as the user's own mistake: which path, what is wrong, what to do."""

import errno
import os
import re

_PERMISSION = "Choose a place that you may read and write, or have its permissions changed."
_FULL = "Make room there, or choose a place on another disk."
_REMEDIES = {
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.ENOENT: "Check the path, and whether something else removed it.",
    errno.ENOTDIR: "A file stands where a folder is needed: choose another path.",
    errno.EISDIR: "A folder stands where a file is needed: give the name of a file.",
    errno.EEXIST: "Something of that name is there already: choose another name, or remove it first.",
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: "Choose a place that takes files of this size, or raise the limit (`ulimit -f`).",
}
_PARTIAL = re.compile(r"(\.[0-9a-f]{12}-\d+-[0-9a-f]{8})?\.partial(?=/|$)")
"""Ending of the name that a file or folder has until it is whole (`files.partial_name`); the user knows it without."""

_WITHOUT_PATH = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""The system says of an open file that the disk is full, or the file too large, and does not say of which file."""


def mistake(error: OSError) -> str | None:
    """The paragraph to show, or None where it is no mistake of a user: another error, or one that names no path."""
    named = error.filename2 or error.filename  # of a file that got its final name, the final one
    if error.errno not in _REMEDIES or not isinstance(named, str | bytes | None) or (named is None and error.errno not in _WITHOUT_PATH):
        return None
    where = "A file could not be written" if named is None else _PARTIAL.sub("", os.fsdecode(named))
    return f"{where}: {os.strerror(error.errno)}. {_REMEDIES[error.errno]} --verbose shows where it happened."
