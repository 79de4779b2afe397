"""``corral``: the table of everything that can be typed first."""

from __future__ import annotations

from typing import Any

import click

import corral
from corral.cli.command import Lazy, LazyGroup, common_options

_DAILY, _NOUNS, _PLATFORM = "Daily", "Things (corral NOUN --help)", "The platform"

TABLE = {
    "launch": Lazy("corral.cli.launch", "launch", "Make a VM and start it", _DAILY),
    "run": Lazy("corral.cli.run", "run", "Run a program in a throw-away VM", _DAILY),
    "list": Lazy("corral.cli.daily", "list_vms", "List VMs", _DAILY),
    "info": Lazy("corral.cli.daily", "info", "Everything about one VM", _DAILY),
    "top": Lazy("corral.cli.top", "top", "Who uses what, live", _DAILY),
    "start": Lazy("corral.cli.power", "start", "Start VMs", _DAILY),
    "stop": Lazy("corral.cli.power", "stop", "Ask guests to power off (--force: cut the power)", _DAILY),
    "restart": Lazy("corral.cli.power", "restart", "Stop and start VMs", _DAILY),
    "delete": Lazy("corral.cli.power", "delete", "Delete VMs and their disks", _DAILY),
    "exec": Lazy("corral.cli.exec", "exec_command", "Run a program in a VM", _DAILY),
    "cp": Lazy("corral.cli.copy", "copy", "Copy files into or out of a VM", _DAILY),
    "ssh": Lazy("corral.cli.ssh", "ssh", "Log in to a VM, or run a program there, by ssh", _DAILY),
    "console": Lazy("corral.cli.console", "console", "A VM's serial console", _DAILY),
    "logs": Lazy("corral.cli.daily", "logs", "What a VM's serial console printed", _DAILY),
    "vm": Lazy("corral.cli.vm", "vm", "Virtual machines", _NOUNS),
    "image": Lazy("corral.cli.image", "image", "What VMs boot from", _NOUNS),
    "template": Lazy("corral.cli.template", "template", "Booted VMs, frozen: launches fork from them", _NOUNS),
    "flavor": Lazy("corral.cli.flavor", "flavor", "Plans: CPUs, memory, disk", _NOUNS),
    "volume": Lazy("corral.cli.noun", "read_only_noun", "Disks of VMs", _NOUNS),
    "network": Lazy("corral.cli.noun", "read_only_noun", "What NICs are plugged into", _NOUNS),
    "project": Lazy("corral.cli.project", "project", "Whose things these are", _NOUNS),
    "host": Lazy("corral.cli.host", "host", "Machines that run VMs", _NOUNS),
    "task": Lazy("corral.cli.task", "task", "Operations under way and done", _NOUNS),
    "event": Lazy("corral.cli.event", "event", "What happened", _NOUNS),
    "up": Lazy("corral.cli.daemon", "up", "Start the platform on this machine", _PLATFORM),
    "down": Lazy("corral.cli.daemon", "down", "Stop the daemon; VMs go on running (--all stops them too)", _PLATFORM),
    "doctor": Lazy("corral.cli.doctor", "doctor", "What works here, what does not, and what to do", _PLATFORM),
    "explain": Lazy("corral.cli.explain", "explain", "Fields, types, defaults and units of any object", _PLATFORM),
    "completion": Lazy("corral.cli.completion", "completion", "Completion for bash, zsh or fish", _PLATFORM),
    "version": Lazy("corral.cli.daemon", "version", "Versions of this command and of the daemon", _PLATFORM),
}


def _version(context: click.Context, _option: click.Parameter, value: bool) -> Any:
    if value and not context.resilient_parsing:
        click.echo(f"corral {corral.__version__}")
        context.exit()


root = LazyGroup(
    "corral",
    table=TABLE,
    help="Real virtual machines on this machine, or many, with or without KVM.\n\n"
    "A first VM: corral launch debian --name web",
    params=[
        *common_options(quiet=False),
        click.Option(
            ["--version"], is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version."
        ),
    ],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    callback=lambda: None,
    no_args_is_help=True,
)
