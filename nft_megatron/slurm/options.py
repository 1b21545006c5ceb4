"""The user's own options of sbatch, read as sbatch reads them, so that quotes, short forms and abbreviations hide nothing.

Refused are those that change whose job it is, what it runs, or what the run's restarts rely on. What a site needs passes, also
options of plugins that are not known here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nft_megatron.base.errors import UserError
from nft_megatron.slurm.quoting import own_option, words

_FIELD = "slurm.sbatch"
_LONG = dict(
    re.findall(
        r"(\w) ([\w-]+)",
        "A account B extra-node-info C constraint D chdir F nodefile G gpus H hold J job-name L licenses M clusters N nodes "
        "O overcommit Q quiet S core-spec V version W wait a array b begin c cpus-per-task d dependency e error h help i input "
        "k no-kill m distribution n ntasks o output p partition q qos s oversubscribe t time v verbose w nodelist x exclude",
    )
)
"""Short option → long option."""
_WITHOUT_VALUE = {"H", "O", "Q", "V", "W", "h", "k", "s", "v"}
"""Short options that no value follows."""
_FLAGS = re.findall(
    r"[\w-]+",
    "contiguous exclusive get-user-env hold ignore-pbs nice overcommit oversubscribe parsable propagate quiet reboot requeue "
    "spread-job use-min-nodes verbose",
)
"""Long options whose value, if they take one, follows an equals sign only."""
_REFUSED = {
    "array": ("would start the run many times at once", "add servers with `nft-megatron slurm rollouts`"),
    "chdir": ("would start the job where its paths do not lead to its files", "submit from that folder"),
    "dependency": ("would let two jobs of the run start at once", "add singleton, as in --dependency=afterok:7,singleton"),
    "export": ("would drop the environment that the job needs", "begin with ALL, as in --export=ALL,NAME=value"),
    "export-file": ("would drop the environment that the job needs", "write `export NAME=value` into slurm.setup"),
    "gid": ("would run the job under another group", "submit it under that group"),
    "help": ("would submit nothing", "remove it"),
    "job-name": ("would hide the job from `nft-megatron slurm`", "set slurm.job_name"),
    "no-kill": ("would keep a job that lost a node from being requeued", "remove it"),
    "no-requeue": ("would end the run at the first time limit", "set slurm.restart=chain"),
    "nodes": ("would give the job other nodes than it uses", "set cluster.trainer_nodes and cluster.rollout_nodes"),
    "signal": ("would replace the request to save before the time limit", "set slurm.signal_seconds"),
    "test-only": ("would submit nothing", "remove it"),
    "uid": ("would run the job as another user", "submit it as that user"),
    "usage": ("would submit nothing", "remove it"),
    "version": ("would submit nothing", "remove it"),
    "wait": ("would not return before the job has ended", "remove it"),
    "workdir": ("would start the job where its paths do not lead to its files", "submit from that folder"),
    "wrap": ("would run another script than the run's", "write lines that run before it into slurm.setup"),
}


class Option(NamedTuple):
    """One option: its long name, or as much of it as was given, and its value."""

    name: str
    value: str | None


def check_own_options(texts: Sequence[str]) -> None:
    """Raise :class:`UserError` for an option of ``slurm.sbatch`` that the run cannot have."""
    for text in texts:
        for name, value in read_options(text):
            known = name in _REFUSED or name in (*_LONG.values(), *_FLAGS)
            meant = [name] if known else [refused for refused in _REFUSED if refused.startswith(name)]
            for refused in meant:
                if refused in _REFUSED and not _is_harmless(refused, value):
                    raise UserError(_FIELD, text, *_REFUSED[refused])


def excluded_nodes(texts: Sequence[str]) -> list[str]:
    """The nodes that ``slurm.sbatch`` excludes, as it writes them."""
    return [value for text in texts for name, value in read_options(text) if name == "exclude" and value]


def read_options(text: str) -> Iterator[Option]:
    """The options in one element of ``slurm.sbatch``, as getopt_long finds them.

    >>> [(option.name, option.value) for option in read_options("--mail-type=END -x n1 -HQt5")]
    [('mail-type', 'END'), ('exclude', 'n1'), ('hold', None), ('quiet', None), ('time', '5')]

    Raises :class:`UserError` for what is no option, such as the name of a script.
    """
    try:
        rest = words(own_option(text))
    except ValueError as error:
        raise UserError(_FIELD, text, str(error), "close it") from error
    if not rest:
        raise UserError(_FIELD, repr(text), "is no option", "remove it")
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word in ("-", "--"):
            raise UserError(_FIELD, text, f"{word!r} is no option of sbatch", "write --option=value")
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            if not equals and rest and not rest[0].startswith("-") and name not in _FLAGS:
                yield Option(name, rest.pop(0))
            else:
                yield Option(name, value if equals else None)
            continue
        for place, letter in enumerate(word[1:], start=2):
            name = _LONG.get(letter, letter)
            if letter in _WITHOUT_VALUE:
                yield Option(name, None)
            else:
                yield Option(name, word[place:] or (rest.pop(0) if rest and not rest[0].startswith("-") else None))
                break


def _is_harmless(name: str, value: str | None) -> bool:
    """Whether this value of an option that is otherwise refused leaves the run as it is."""
    parts = (value or "").split(",")
    if name in ("export", "dependency"):
        return ("ALL" if name == "export" else "singleton") in parts
    return (name, value) == ("no-kill", "off")
