"""A process that kills itself at one of its file operations. The earlier ones decide what the kill leaves on disk."""

import os
import signal
import sys

_OPERATIONS = {"open", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate"}


class Dying:
    """From now on, count operations on paths that start with ``root``, and send SIGKILL before number ``moment``.

    ``moment`` 0: never. :meth:`operate` counts what Python's audit hooks do not see.
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
