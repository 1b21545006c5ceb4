"""A process that kills itself at one of its operations on files. What a kill leaves on a disk is decided by those before it."""

import os
import signal
import sys

_OPERATIONS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}


class Dying:
    """From here on operations on paths that begin with ``root`` are counted, and SIGKILL comes before number ``moment``.

    ``moment`` 0: it lives. :meth:`operate` counts what Python's audit hooks don't see.
    """

    def __init__(self, root: str, moment: int) -> None:
        self.count, self._root, self._moment = 0, root, moment
        sys.addaudithook(self._look)

    def operate(self) -> None:
        self.count += 1
        if self.count == self._moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def _look(self, event: str, arguments: tuple) -> None:
        is_path = event in _OPERATIONS and isinstance(arguments[0], (str, os.PathLike))
        if is_path and str(arguments[0]).startswith(self._root):
            self.operate()
