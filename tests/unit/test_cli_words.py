"""Command lines: what stands where, what flags mean, and what is said about wrong ones."""

from __future__ import annotations

import click
import pytest

from corral.cli.command import GuestCommand
from corral.cli.console import Keys
from corral.cli.copy import Place, parse_place
from corral.cli.explain import explain
from corral.cli.failures import asked_for_json, clean
from corral.cli.image import format_of
from corral.cli.launch import assign, forward, public_keys, request, user_data
from corral.cli.output import port, shown, table
from corral.cli.root import TABLE, root
from corral.cli.session import Session
from corral.errors import Invalid, NotFound
from corral.units import parse_size


@click.command("exec", cls=GuestCommand)
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option("-i", is_flag=True)
@click.option("-t", is_flag=True)
@click.option("--env", "-e", multiple=True)
def probe(**given: object) -> dict[str, object]:
    return given


@pytest.mark.parametrize(
    ("words", "name", "command", "flags"),
    [
        ("web -- ls -l", "web", ["ls", "-l"], ""),
        ("web ls -l", "web", ["ls", "-l"], ""),
        ("-it web -- sh", "web", ["sh"], "it"),
        ("web -i -t -- sh -c x", "web", ["sh", "-c", "x"], "it"),
        ("-e A=b web env", "web", ["env"], ""),
        ("--env A=b -i web -e C=d -- env -i", "web", ["env", "-i"], "i"),
        ("-ie A=b web env", "web", ["env"], "i"),
        ("web sh -- a", "web", ["sh", "--", "a"], ""),
        ("web -- -- a", "web", ["--", "a"], ""),
        ("-- -odd -- ls", "-odd", ["ls"], ""),
        ("web", "web", [], ""),
    ],
)
def test_options_end_where_the_command_begins(words: str, name: str, command: list[str], flags: str) -> None:
    given = probe.main(words.split(), standalone_mode=False)
    assert (given["name"], list(given["command"])) == (name, command)
    assert "".join(flag for flag in "it" if given[flag]) == flags


def test_every_command_of_the_table_loads_and_has_help() -> None:
    context = click.Context(root, info_name="corral")
    for name in TABLE:
        command = root.get_command(context, name)
        assert command is not None
        assert command.help, name
        if isinstance(command, click.Group):
            inner = click.Context(command, info_name=name, parent=context)
            for verb in command.list_commands(inner):
                found = command.get_command(inner, verb)
                assert found is not None, f"{name} {verb}"
                assert found.help, f"{name} {verb}"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("web:/root/x", Place("web", "/root/x")),
        ("team/web:/x", Place("team/web", "/x")),
        ("./web:/x", Place("", "./web:/x")),
        ("/tmp/a:b", Place("", "/tmp/a:b")),
        ("plain", Place("", "plain")),
        ("a/b:c", Place("", "a/b:c")),
    ],
)
def test_which_side_of_a_copy_is_in_a_vm(text: str, place: Place) -> None:
    assert parse_place(text) == place


def test_a_relative_path_in_a_vm_is_refused_with_the_right_one() -> None:
    with pytest.raises(Invalid, match="web:/notes"):
        parse_place("web:notes")


def test_ports_as_they_are_typed() -> None:
    assert forward("8080:80") == {"host": 8080, "guest": 80}
    assert forward("0:53/udp") == {"host": 0, "guest": 53, "protocol": "udp"}
    assert forward("0.0.0.0:1:2") == {"host": 1, "guest": 2, "address": "0.0.0.0"}
    for bad in ("80", "a:b", "1:2/sctp", "1:2:3:4", "", ":", "١:٢"):
        with pytest.raises(click.BadParameter):
            forward(bad)


def test_set_reaches_any_field() -> None:
    spec: dict[str, object] = {"image": "micro"}
    for word in ("memory.size=1G", "cpu.count=2", "restart=never", "spec.firmware=uefi"):
        assign(spec, word)
    assert spec == {
        "image": "micro", "memory": {"size": parse_size("1G")}, "cpu": {"count": 2}, "restart": "never", "firmware": "uefi",
    }  # fmt: skip
    for bad in ("memory", "=1", "a..b=1", "image.x=1"):
        with pytest.raises(click.BadParameter):
            assign(spec, bad)


def test_only_what_is_given_goes_into_the_request(tmp_path) -> None:  # type: ignore[no-untyped-def]
    empty = dict.fromkeys(("name", "count", "flavor", "cpus", "memory", "disk", "network", "user_data"))
    empty |= {"publish": (), "ssh_key": (), "label": (), "assign": ()}
    assert request("micro", empty)["spec"] == {"image": "micro"}
    (tmp_path / "key.pub").write_text("# mine\nssh-ed25519 AAAA me\n")
    full = request(
        "micro", empty | {"cpus": 0, "publish": ("1:2",), "ssh_key": (str(tmp_path / "key.pub"),), "label": ("a=b=c",)}
    )
    assert full["spec"]["cpu"] == {"count": 0}, "nonsense is for the API to refuse, with every other problem"
    assert full["spec"]["nics"] == [{"network": "user", "publish": [{"host": 1, "guest": 2}]}]
    assert full["spec"]["ssh_keys"] == ["ssh-ed25519 AAAA me"]
    assert full["labels"] == {"a": "b=c"}


def test_files_that_cannot_be_user_data_or_keys_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "large").write_bytes(b"x" * 70_000)
    (tmp_path / "secret").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    for bad in ("bytes", "large", "missing", "."):
        with pytest.raises(Invalid):
            user_data(str(tmp_path / bad))
    with pytest.raises(Invalid):
        user_data("/dev/zero")
    with pytest.raises(Invalid, match=r"secret\.pub"):
        public_keys(str(tmp_path / "secret"))


def test_a_format_is_declared_by_name_or_flag_never_guessed() -> None:
    assert format_of("a.qcow2") == "qcow2"
    assert format_of("https://x/y.raw.xz") == "raw"
    for unsure in ("disk.img", "disk", "x.tar"):
        with pytest.raises(click.UsageError, match="--format"):
            format_of(unsure)


def test_the_escape_leaves_and_can_be_sent() -> None:
    keys = Keys()
    assert keys.feed(b"ab\x1d\x1dc") == b"ab\x1dc"
    assert keys.feed(b"\x1d") == b""
    assert keys.feed(b"x") == b"\x1dx"
    assert not keys.left
    assert keys.feed(b"y\x1dqmore") == b"y"
    assert keys.left


def test_json_is_recognised_on_lines_that_do_not_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CORRAL_OUTPUT", raising=False)
    assert asked_for_json(["list", "--nope", "-o", "json"])
    assert asked_for_json(["list", "--output=json"])
    assert not asked_for_json(["exec", "web", "--", "tool", "-o", "json"])
    assert not asked_for_json(["list", "-o", "wide"])
    monkeypatch.setenv("CORRAL_OUTPUT", "json")
    assert asked_for_json(["list"])


def test_a_name_cannot_drive_the_terminal() -> None:
    assert clean("web\x1b[2J\n\u202eevil") == "web\\x1b[2J\\n\\u202eevil"
    assert shown("a\rb") == "a\\rb"


def test_tables_and_values() -> None:
    assert table(("A", "LONG"), [("1", "x"), ("22", "")]) == "A   LONG\n1   x\n22"
    assert port({"host": 1, "guest": 2, "protocol": "udp", "address": "0.0.0.0"}) == "0.0.0.0:1:2/udp"
    assert shown(1 << 30, "size") == "1G"
    assert shown(True) == "yes"


def test_explain_prints_fields_defaults_and_their_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session()
    explain.main(["vm.spec.memory"], standalone_mode=False, obj=session)
    said = capsys.readouterr().out
    assert "512M" in said
    assert "multiple of 1 MiB" in said
    explain.main(["vm.spec.nics[0].publish"], standalone_mode=False, obj=session)
    assert "Port on the host" in capsys.readouterr().out
    with pytest.raises(NotFound, match="no field"):
        explain.main(["vm.spec.nope"], standalone_mode=False, obj=session)
