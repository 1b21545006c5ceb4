"""The comparison's starting point: the quickstart's task with four to six numbers and a shorter cold start.

    python examples/paper/prepare.py --out DIR --seed N

DIR has the same content as that of the quickstart's prepare.py, with different constants.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))
import arithmetic
import prepare

arithmetic.NUM_NUMBERS = (4, 4, 4, 5, 5, 6)
prepare.NUM_HELD_OUT = 500
prepare.NUM_UPDATES = 900

if __name__ == "__main__":
    prepare.main()
