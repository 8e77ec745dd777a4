"""A folder of this process alone for what libraries put on disk: uploads that are parsed, Gradio's cache.

It goes with the process. One that was killed leaves its folder, without the lock that was held on it: the
next process that starts takes it away.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pixart.locks import claimed

_PREFIX, _LOCK = "pixart-serve-", "lock"
_OF_GRADIO = "GRADIO_TEMP_DIR"


@contextmanager
def private_folder() -> Iterator[Path]:
    """A new folder that nobody else may read, where `tempfile` and Gradio put their files until the block
    ends. Those of processes of this user that were killed are removed first."""
    root = Path(tempfile.gettempdir())
    remove_stale(root)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))  # 0700
    before = tempfile.tempdir, os.environ.get(_OF_GRADIO)
    try:
        with claimed(folder / _LOCK, wait=True):
            tempfile.tempdir = str(folder)
            os.environ[_OF_GRADIO] = str(folder / "gradio")
            yield folder
    finally:
        tempfile.tempdir = before[0]
        if before[1] is None:
            os.environ.pop(_OF_GRADIO, None)
        else:
            os.environ[_OF_GRADIO] = before[1]
        shutil.rmtree(folder, ignore_errors=True)


def remove_stale(root: Path) -> None:
    """Remove the folders here whose processes have ended, however they ended."""
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if not _is_ours(folder) or not (folder / _LOCK).is_file():
                continue  # another user's, or one that is being made
            with claimed(folder / _LOCK, wait=False) as is_free:
                if is_free:
                    shutil.rmtree(folder, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Where everybody may write, everybody may put a link of that name."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return os.name != "posix" or folder.stat().st_uid == os.getuid()
