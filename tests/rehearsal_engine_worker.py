"""rehearsal_worker.py with Transformer Engine's layers; see rehearsal_engine.py, which comes before Megatron-Core."""

import sys
from pathlib import Path

import rehearsal_engine  # noqa: F401
from rehearsal_worker import main

if __name__ == "__main__":
    main(Path(sys.argv[1]))
