"""A fixed table of answers and golds, and a fingerprint of their verdicts for every version of the rules.

    python tests/verify/rules_table.py

adds the fingerprints of new versions to ``rules_table.json``; it never replaces one, so changed verdicts need a new version.
"""

import hashlib
import json
import sys
from pathlib import Path

from nft_megatron.verify.comparison import Undecided
from nft_megatron.verify.modes import MODES
from nft_megatron.verify.worker import JUDGES

TABLE = Path(__file__).with_name("rules_table.json")
OWN_RULES = tuple(name for name, mode in MODES.items() if mode.version and not mode.is_free)
"""The modes whose rules for mathematics are in this package: not those of math-verify alone, whose version is the package's."""


def verdict_of(mode: str, text: str, gold: str) -> str:
    """The reason of the verdict on a complete answer, with computer algebra in this process."""
    decided = MODES[mode].decide(text, gold, "stop")
    if not isinstance(decided, Undecided):
        return decided.reason
    try:
        return JUDGES[MODES[mode].judge or ""](decided.gold, decided.text, decided.question)[0]
    except Exception as error:
        return f"crash: {type(error).__name__}"


def read() -> tuple[list[tuple[str, str]], dict[str, str]]:
    """The rows (text, gold), and the fingerprint of each version."""
    content = json.loads(TABLE.read_text())
    return [(text, gold) for text, gold in content["rows"]], content["fingerprints"]


def fingerprint(mode: str, rows: list[tuple[str, str]]) -> str:
    """A hash of all verdicts, in order."""
    return hashlib.sha256("\n".join(verdict_of(mode, *row) for row in rows).encode()).hexdigest()[:16]


def changed(mode: str, found: str, fingerprints: dict[str, str]) -> str | None:
    """What to do, if ``found`` is not the fingerprint of the mode's version."""
    version = MODES[mode].version
    if version not in fingerprints:
        return f"{version} is new: run python {TABLE.parent.name}/{Path(__file__).name} in tests/ to record its verdicts"
    if fingerprints[version] != found:
        return f"verdicts of mode {mode} have changed, so {version} must too: raise the number where that text is defined"
    return None


def main() -> None:
    rows, fingerprints = read()
    for mode in OWN_RULES:
        found = fingerprint(mode, rows)
        if fingerprints.setdefault(MODES[mode].version, found) != found:
            sys.exit(changed(mode, found, fingerprints))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    TABLE.write_text(f'{{"fingerprints": {json.dumps(fingerprints, indent=1)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
