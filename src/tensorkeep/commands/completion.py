"""`tensorkeep completion`: the script by which a shell completes commands, flags and their values."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any, Literal

from cyclopts import Parameter


def completion(
    shell: Literal["bash", "zsh", "fish"], /, *, parser: Annotated[Any, Parameter(parse=False, show=False)] = None
) -> int:
    """Print what makes a shell complete this program's commands and flags.

    bash: put `eval "$(tensorkeep completion bash)"` into ~/.bashrc. zsh: write it to a file `_tensorkeep` in a folder
    of $fpath. fish: write it to ~/.config/fish/completions/tensorkeep.fish. Again after an update of tensorkeep.

    Args:
        shell: The shell.
    """
    sys.stdout.write(with_files(shell, parser.generate_completion(prog_name="tensorkeep", shell=shell)))
    return 0


def with_files(shell: str, text: str) -> str:
    """Return a script of cyclopts that completes file names wherever it knows nothing better, as fish does by itself.

    Most arguments are a path, a Hub model id or a URL, so they are texts, of which cyclopts completes none. bash's own
    completion of files also knows spaces in names and ends folders with a slash.
    """
    if shell == "bash":
        text = re.sub(r'COMPREPLY=\( \$\(compgen -f -- "\$\{cur\}"\) \)', "COMPREPLY=()", text)
        return re.sub(r"^complete -F ", "complete -o default -F ", text, flags=re.MULTILINE)
    if shell == "zsh":
        told = r"(?:[^:'\\\n]|\\.|'\\'')*"
        text = re.sub(rf"^( +'(?:\d+|\*):{told})(?='(?: \\)?$)", r"\1:_files", text, flags=re.MULTILINE)
        return re.sub(rf"(\]:{told})(?='(?: \\)?$)", r"\1:_files", text, flags=re.MULTILINE)
    return text
