"""What all commands share: the options that every one takes, lazy loading, and what stands before and after ``--``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import click

from corral.cli.session import FORMATS

_COMMON = (
    ("output", ("-o", "--output"), click.Choice(FORMATS), "How to print the answer (CORRAL_OUTPUT)."),
    ("project", ("--project",), click.STRING, "Whose things: the project (CORRAL_PROJECT; default: default)."),
    ("url", ("--url",), click.STRING, "A daemon elsewhere, like https://host:8470 (CORRAL_URL)."),
    ("token", ("--token",), click.STRING, "Token for --url (CORRAL_TOKEN is safer: other users can see arguments)."),
    ("state", ("--state",), click.Path(file_okay=False), "The local state directory (CORRAL_STATE)."),
)
_RARE = ("url", "token", "state")


def common_options(*, quiet: bool) -> list[click.Option]:
    """Fresh option objects; ``quiet`` keeps the rare ones out of a command's own help."""
    return [
        click.Option(
            flags, type=kind, help=text, expose_value=False, callback=_remember, hidden=quiet and name in _RARE
        )
        for name, flags, kind, text in _COMMON
    ]  # fmt: skip


def _remember(context: click.Context, option: click.Parameter, value: Any) -> None:
    if value is not None and not context.resilient_parsing:
        context.obj.set_option(option.name, value)


class Command(click.Command):
    """A command that also takes the common options, before or after its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(common_options(quiet=True))


class GuestCommand(Command):
    """``[OPTIONS] NAME [OPTIONS] [--] WORDS…``: options end at the first word that is neither option nor NAME.

    So ``corral exec web ls -l`` and ``corral exec web -t -- ls -l`` both mean what they look like.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = self._after_options(args, 0)
        if at < len(args) and args[at] == "--":
            head, name, rest = args[:at], args[at + 1 : at + 2], args[at + 2 :]
        else:
            end = self._after_options(args, at + 1)
            head, name, rest = args[:at] + args[at + 1 : end], args[at : at + 1], args[end:]
        if rest[:1] == ["--"]:
            rest = rest[1:]
        return super().parse_args(ctx, [*head, "--", *name, *rest])

    def _after_options(self, args: list[str], at: int) -> int:
        """Index of the first word from ``at`` on that is no option and no option's value."""
        valued = {
            flag for p in self.params if isinstance(p, click.Option) and not p.is_flag for flag in p.opts
        }  # fmt: skip
        while at < len(args) and args[at].startswith("-") and args[at] not in ("-", "--"):
            word = args[at]
            bundled = not word.startswith("--") and len(word) > 2 and f"-{word[-1]}" in valued
            at += 2 if word in valued or (bundled and f"-{word[1]}" not in valued) else 1
        return at


class Lazy(NamedTuple):
    """Where a command is and what it says about itself in a list, so that the list need not load it."""

    module: str
    attribute: str
    summary: str
    section: str = "Commands"


class LazyGroup(click.Group):
    """A group whose commands are imported when they are typed.

    ``make`` is asked for names that the table lacks, for commands that are generated (nouns over the table of kinds).
    """

    def __init__(self, *args: Any, table: Mapping[str, Lazy], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.table, *(name for name in self.commands if name not in self.table)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.table and cmd_name not in self.commands:
            row = self.table[cmd_name]
            found = getattr(importlib.import_module(row.module), row.attribute)
            if not isinstance(found, click.Command):
                make: Callable[[str], click.Command] = found
                found = make(cmd_name)
            self.commands[cmd_name] = found
        return self.commands.get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, self.list_commands(ctx), 3)
            meant = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"no such command {name!r}{meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for name in self.list_commands(ctx):
            row = self.table.get(name)
            if row is not None:
                sections.setdefault(row.section, []).append((name, row.summary))
            elif not self.commands[name].hidden:
                sections.setdefault("Commands", []).append((name, self.commands[name].get_short_help_str(80)))
        for title, rows in sections.items():
            with formatter.section(title):
                formatter.write_dl(rows)
