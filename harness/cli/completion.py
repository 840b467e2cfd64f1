"""`harness completion SHELL`: a script by which bash, zsh or fish complete commands, options and values.

It is made once, of what `--help` says of each command, and asks no Python when a key is pressed.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from harness.cli.arguments import RUN_HELP, parser

__all__ = ["SHELLS", "Completed", "completed_commands", "run"]

_DESCRIPTION = (
    "Print a script for your shell. bash: harness completion bash > "
    "~/.local/share/bash-completion/completions/harness; zsh: harness completion zsh > a folder of "
    "$fpath/_harness, before compinit; fish: harness completion fish > "
    "~/.config/fish/completions/harness.fish"
)
_OPTION = re.compile(r"(?<![\w-])(--[a-z][\w.-]*\w)(?: (?:\{([^}]*)\}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """What can be completed after a command."""

    what: str
    """What the command does."""
    options: Mapping[str, tuple[str, ...]]
    """The values of each option, where they can be listed."""
    words: tuple[str, ...] = ()
    """Other arguments."""
    takes_runs: bool = False
    """Other arguments are runs, of the folder runs/."""


def run(argv: Sequence[str]) -> int:
    """Prints the script."""
    arguments = parser("completion", _DESCRIPTION)
    arguments.add_argument("shell", choices=sorted(SHELLS))
    print(SHELLS[arguments.parse_args(argv).shell](completed_commands()))
    return 0


def completed_commands() -> dict[str, Completed]:
    """All commands, those of other packages by their names only."""
    from harness.cli.main import COMMANDS, added_commands, main
    from harness.config.presets import preset_names

    def help_of(name: str) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([name, "--help"])
        return " ".join(printed.getvalue().split())

    commands = {}
    for name, command in COMMANDS.items():
        said = help_of(name)
        found: dict[str, tuple[str, ...]] = {}
        # The usage has the values of an option, and what follows mentions some without them.
        for option, values in _OPTION.findall(said):
            found[option] = found.get(option) or tuple(filter(None, values.split(",")))
        if "--config" in found:
            found["--config"] = tuple(preset_names())
        commands[name] = Completed(
            what=command.what,
            options=found,
            words=tuple(sorted(SHELLS)) if name == "completion" else (),
            takes_runs=RUN_HELP in said,
        )
    return commands | {name: Completed(what="", options={}) for name in added_commands()}


# Names of folders are data: compgen -W would run a $(...) in one, and split one at its blanks.
_BASH_RUNS = (
    "_harness_runs() {",
    "  local folder name quoted",
    "  COMPREPLY=()",
    "  for folder in runs/*/; do",
    "    name=${folder#runs/} name=${name%/}",
    '    quoted=$(printf %q "$name")',
    '    if [[ -d $folder && ( $name == "$current"* || $quoted == "$current"* ) ]]; then',
    '      COMPREPLY+=("$quoted")',
    "    fi",
    "  done",
    "}",
)


_COMPLETE_BY = "-o bashdefault -o default -F _harness"


def _bash(commands: Mapping[str, Completed]) -> str:
    values = [
        f"    {shlex.quote(f'{name} {option}')}) words={shlex.quote(' '.join(words))} ;;"
        for name, command in commands.items()
        for option, words in command.options.items()
        if words
    ]
    options = [
        f"    {name}) words={shlex.quote(' '.join(command.options))} ;;" for name, command in commands.items()
    ]
    others = [
        f"    {name}) {_others(command)} ;;"
        for name, command in commands.items()
        if command.words or command.takes_runs
    ]
    return "\n".join(
        [
            "# bash completion of harness",
            *_BASH_RUNS,
            "_harness() {",
            '  local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
            '  local command="${COMP_WORDS[1]}" words=',
            f"  if ((COMP_CWORD == 1)); then words={shlex.quote(' '.join(commands))}",
            '  elif [[ $current != -* ]]; then case "$command $before" in',
            *values,
            '    *) case "$command" in',
            *("  " + line for line in others),
            "    esac ;;",
            '  esac; else case "$command" in',
            *options,
            "  esac; fi",
            '  COMPREPLY=($(compgen -W "$words" -- "$current"))',
            "}",
            f"complete {_COMPLETE_BY} harness",
        ]
    )


def _others(command: Completed) -> str:
    return "_harness_runs; return" if command.takes_runs else f"words={shlex.quote(' '.join(command.words))}"


def _zsh(commands: Mapping[str, Completed]) -> str:
    """As bash completes, which zsh can do too. To be sourced after compinit, or found by it as _harness."""
    return "\n".join(
        [
            "#compdef harness",
            "autoload -U +X bashcompinit && bashcompinit",
            _bash(commands),
            # Loaded by compinit, the script itself is what the first Tab calls.
            f"if [[ ${{funcstack[1]}} == _harness ]]; then _bash_complete {_COMPLETE_BY}; fi",
        ]
    )


_FISH_RUNS = (
    "function __harness_runs",
    "    for folder in runs/*/",
    "        string replace -r '^runs/(.*)/$' '$1' -- $folder",
    "    end",
    "end",
)


def _fish(commands: Mapping[str, Completed]) -> str:
    def line(condition: str, *more: str) -> str:
        return f"complete -c harness -n {shlex.quote(condition)} {' '.join(more)}"

    lines = ["# fish completion of harness", *_FISH_RUNS]
    for name, command in commands.items():
        lines.append(line("__fish_use_subcommand", "-f", "-a", name, "-d", _quoted(command.what)))
        within = f"__fish_seen_subcommand_from {name}"
        for option, words in command.options.items():
            listed = ("-x", "-a", _quoted(" ".join(words))) if words else ()
            lines.append(line(within, "-l", option.removeprefix("--"), *listed))
        if command.takes_runs:
            lines.append(line(within, "-f", "-a", "'(__harness_runs)'"))
        if command.words:
            lines.append(line(within, "-f", "-a", _quoted(" ".join(command.words))))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SHELLS: dict[str, Callable[[Mapping[str, Completed]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""What makes the script of each."""
