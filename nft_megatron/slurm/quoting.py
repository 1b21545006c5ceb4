"""How values are written for Slurm, whose two readers differ from a shell: #SBATCH lines, and patterns of file names.

A #SBATCH line is split at white space and ends at ``#``. Quotes of either kind protect both, and a backslash the next
character, inside quotes of either kind too (sbatch/opt.c, _get_argument). In the name of an output file ``%j`` is the job's
number and ``%%`` a percent sign, and a backslash switches all of that off (fname.c).
"""

from __future__ import annotations

import re
from pathlib import Path

from nft_megatron.base.errors import UserError

_OPTION = re.compile(r"(--?[\w-]++)(=|\s++)(.*+)", re.DOTALL)


def sbatch_word(text: str) -> str:
    r"""``text`` as one word of a #SBATCH line.

    >>> print(sbatch_word("--chdir=/home/me"), sbatch_word("--chdir=/my runs/#1"), sbatch_word('--comment=5" \\ x'))
    --chdir=/home/me "--chdir=/my runs/#1" "--comment=5\" \\ x"
    """
    if not re.search(r"[\s#\"'\\]", text):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def own_option(text: str) -> str:
    """An option of ``slurm.sbatch`` as it goes into a #SBATCH line: its value is quoted, unless the user has quoted it.

    >>> own_option("--comment=for tuesday"), own_option("--comment='for tuesday'"), own_option("--qos high")
    ('"--comment=for tuesday"', "--comment='for tuesday'", '--qos high')
    """
    found = _OPTION.fullmatch(text.strip())
    if found is None or re.search(r"[\"'\\]|\s-", found[3]):
        return text
    name, separator, value = found.groups()
    return sbatch_word(f"{name}={value}") if separator == "=" else f"{name} {sbatch_word(value)}"


def words(line: str) -> list[str]:
    r"""The words that sbatch reads in a #SBATCH line.

    >>> words(r'--comment="a \"b\" #1" --wr"ap"=ls # not this')
    ['--comment=a "b" #1', '--wrap=ls']

    Raises ``ValueError`` for a quote that is not closed.
    """
    found: list[str] = []
    word: list[str] | None = None
    quote, letters = "", iter(line)
    for letter in letters:
        if letter == "\\":
            word = [*(word or []), next(letters, letter)]
        elif letter == quote:
            quote = ""
        elif not quote and letter in "\"'":
            quote, word = letter, word or []
        elif not quote and (letter.isspace() or letter == "#"):
            found += ["".join(word)] if word is not None else []
            word = None
            if letter == "#":
                break
        else:
            word = [*(word or []), letter]
    if quote:
        raise ValueError(f"has a {quote} that is not closed")
    return [*found, "".join(word)] if word is not None else found


def file_pattern(path: Path) -> str:
    """``path`` where Slurm expects a pattern: its own percent signs are no symbols.

    Raises :class:`UserError` for a path that no pattern can express.

    >>> file_pattern(Path("/runs/50%/slurm")) + "/job_%j.log"
    '/runs/50%%/slurm/job_%j.log'
    """
    text = str(path)
    if "\\" in text or not text.isprintable():
        raise UserError("run_dir", repr(text), "Slurm cannot write files to such a path", "use no backslash and no line break")
    return text.replace("%", "%%")
