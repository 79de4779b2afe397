"""``corral completion bash|zsh|fish``: the script that a shell reads to complete our words."""

from __future__ import annotations

import click

from corral.cli.command import Command

_HOW = {
    "bash": "source <(corral completion bash)",
    "zsh": "source <(corral completion zsh)",
    "fish": "corral completion fish | source",
}


@click.command("completion", cls=Command)
@click.argument("shell", type=click.Choice(tuple(_HOW)))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    \b
    bash, zsh: source <(corral completion bash)
    fish:      corral completion fish | source
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None, "click knows the shells that the argument allows"
    complete = found(context.find_root().command, {}, "corral", "_CORRAL_COMPLETE")
    print(f"# To use it: {_HOW[shell]}")
    print(complete.source())
