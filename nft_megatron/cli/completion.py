"""``nft-megatron completion``: the script by which a shell completes commands, options, files and configuration keys."""

from __future__ import annotations

import argparse
import re
from string import Template

from nft_megatron.cli.arguments import describe, user_path

_INSTALL = {
    "bash": "  nft-megatron completion bash > ~/.local/share/bash-completion/completions/nft-megatron",
    "zsh": "  nft-megatron completion zsh > ~/.zfunc/_nft-megatron     with fpath+=(~/.zfunc) before compinit in ~/.zshrc",
    "fish": "  nft-megatron completion fish > ~/.config/fish/completions/nft-megatron.fish",
}

_OVERRIDES = {
    # bash takes a word apart at "=": what stands before it is the word before that, and only what follows is replaced
    "bash": """\
_nft_megatron_overrides() {
  local before= word=$$1
  if [[ $$word == "=" ]]; then before=$${COMP_WORDS[COMP_CWORD-1]}= word=
  elif [[ $${COMP_WORDS[COMP_CWORD-1]} == "=" ]]; then before=$${COMP_WORDS[COMP_CWORD-2]}=
  fi
  if [[ -z $$before ]]; then compgen -W "$keys" -- "$$word"; return; fi
  local found
  for found in $$(compgen -W "$values" -- "$$before$$word"); do echo "$${found#*=}"; done
}
_nft_megatron() {
  _shtab_nft_megatron
  [[ $${COMPREPLY[0]-} != *= ]] || compopt -o nospace 2>/dev/null
}
""",
    "zsh": """\
_nft_megatron_overrides() {
  if [[ $$PREFIX == *=* ]]; then compadd -- $values; else compadd -S '' -- $keys; fi
}
""",
    "fish": """\
function _nft_megatron_overrides
  if string match -q '*=*' -- (commandline -ct)
    printf '%s\\n' $values
  else
    printf '%s\\n' $keys
  end
end
""",
}
"""A function of each shell that offers ``section.key=``, and once that is typed its values."""

_CALL = {"bash": "_nft_megatron_overrides", "zsh": "_nft_megatron_overrides", "fish": "(_nft_megatron_overrides)"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Help and arguments of this command."""
    describe(
        parser,
        _run,
        "Print the script by which SHELL completes commands, options, files, and the configuration keys of overrides with "
        "their values. Print it again after an upgrade.",
        epilog="To install it\n"
        + "\n".join(_INSTALL.values())
        + "\n\nFor this shell alone: source <(nft-megatron completion bash)",
    )
    parser.add_argument("shell", metavar="SHELL", choices=tuple(_INSTALL), help=", ".join(_INSTALL))


def _run(options: argparse.Namespace) -> None:
    print(completion_script(options.shell))


def completion_script(shell: str) -> str:
    """The script for bash, zsh or fish. It starts no Python when it completes."""
    import shtab

    from nft_megatron.cli.main import COMMANDS, build_parser
    from nft_megatron.config.load import override_values

    parser = build_parser(COMMANDS)
    _mark(parser)
    words = override_values()
    preamble = Template(_OVERRIDES[shell]).substitute(
        keys=" ".join(f"{key}=" for key in words),
        values=" ".join(f"{key}={value}" for key, values in words.items() for value in values),
    )
    script = shtab.complete(parser, shell, preamble=preamble)
    if shell == "bash":
        return f"{script}\ncomplete -o bashdefault -F _nft_megatron {parser.prog}"
    return (
        re.sub(r'"\(\*\)::?', '"*:', script) if shell == "zsh" else script
    )  # shtab 1.13 lets zsh complete only the first of "*"


def _mark(parser: argparse.ArgumentParser) -> None:
    """Tell shtab which arguments are paths, and which are overrides."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _mark(command)
        elif action.dest == "overrides":
            action.complete = _CALL  # type: ignore[attr-defined]
        elif action.type is user_path or action.metavar in ("CONFIG", "PATH"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
