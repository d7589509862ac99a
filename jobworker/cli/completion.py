"""`jobworker completion`: the script that makes a shell complete commands, flags and job ids."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

# Both names of the program.
PROGRAMS = ("jobworker", "job-worker-cli")


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Prints a script: it completes commands, options, job ids.

    \b
    bash:  echo 'eval "$(jobworker completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(jobworker completion zsh)"' >> ~/.zshrc
    fish:  jobworker completion fish > ~/.config/fish/completions/jobworker.fish
    """
    completer = get_completion_class(shell)
    assert completer
    root = click.get_current_context().find_root().command
    for program in PROGRAMS:
        variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
        click.echo(completer(root, {}, program, variable).source())
