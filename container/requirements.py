"""``python3 requirements.py TABLE SIDE [NAME …]``: pip's requirements of trainer or servers, from the table of versions.

With NAMEs only those; a NAME stands for all its extras.
"""

import sys
import tomllib
from pathlib import Path


def requirements(table: Path, side: str, names: list[str]) -> list[str]:
    """One line for each package of ``side``."""
    versions = tomllib.loads(table.read_text())[side]
    unknown = set(names) - {package.partition("[")[0] for package in versions}
    if unknown:
        raise SystemExit(f"{table}: no {', '.join(sorted(unknown))} in [{side}]")
    chosen = [package for package in versions if not names or package.partition("[")[0] in names]
    return [f"{package}=={versions[package]}" for package in chosen]


if __name__ == "__main__":
    print("\n".join(requirements(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])))
