"""How a command begins and ends: exit status, error lines, closed pipes, Ctrl-C. No traceback ever reaches a person."""

from __future__ import annotations

import os
import sys

import click

from corral.cli import failures
from corral.cli.session import FORMATS, Session
from corral.errors import Bug, CorralError

INTERRUPTED = 130


def run(arguments: list[str] | None = None) -> int:
    """One command line, from its arguments to its exit status (cli.md lists them)."""
    _ensure_standard_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    session = Session.from_environment()
    try:
        status = _invoke(given, session)
    except BrokenPipeError:
        status = 0  # whoever read our output has seen enough: that is no failure
    return _flushed(status)


def _invoke(given: list[str], session: Session) -> int:
    as_json = failures.asked_for_json(given)
    try:
        _check_text(given)
        if session.output not in FORMATS:
            raise click.UsageError(f"CORRAL_OUTPUT is {session.output!a}; it may be one of {', '.join(FORMATS)}")
        return _command(given, session)
    except click.exceptions.Exit as ended:
        return ended.exit_code
    except click.UsageError as error:
        return failures.report_usage(error, as_json=as_json)
    except click.ClickException as error:
        return failures.report(CorralError(error.format_message(), code="usage"), as_json=as_json)
    except (KeyboardInterrupt, click.Abort):
        failures.line("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except CorralError as error:
        return failures.report(error, as_json=as_json or session.output == "json")
    except Exception as error:  # noqa: BLE001 - the last line: a person gets a sentence, never a traceback
        return _unexpected(error, session, as_json=as_json or session.output == "json")
    finally:
        session.close()


def _command(given: list[str], session: Session) -> int:
    """Parse and run. Not by click's own ``main``: that ends the process by itself when a pipe is closed."""
    from corral.cli.root import root

    if "_CORRAL_COMPLETE" in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(root, {"obj": session}, "corral", "_CORRAL_COMPLETE", os.environ["_CORRAL_COMPLETE"])
    with root.make_context("corral", given, obj=session) as context:
        result = root.invoke(context)
    return result if isinstance(result, int) else 0


def _unexpected(error: Exception, session: Session, *, as_json: bool) -> int:
    """Something that we did not think of. CORRAL_DEBUG=1 shows where."""
    if os.environ.get("CORRAL_DEBUG"):
        import traceback

        traceback.print_exception(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        problem = CorralError(f"{where}{error.strerror or error}", hint="CORRAL_DEBUG=1 shows where it happened")
        return failures.report(problem, as_json=as_json)
    text = " ".join(str(error).split())[:300]
    problem = Bug(
        f"an error in Corral itself: {type(error).__name__}" + (f": {text}" if text else ""),
        hint=f"CORRAL_DEBUG=1 shows where it happened; the daemon's log is {session.state / 'daemon.log'}",
    )
    return failures.report(problem, as_json=as_json)


def _check_text(given: list[str]) -> None:
    for number, word in enumerate(given, 1):
        try:
            word.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"argument {number} is not valid UTF-8: {word!a}") from None


def _ensure_standard_streams() -> None:
    """A command may be started with its standard descriptors closed; a socket must never land on 0, 1 or 2."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives as long as the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123 - lives as long as the process
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")  # a locale without our letters gets escapes, not a crash


def _flushed(status: int) -> int:
    """Flush here and not at interpreter exit, where a failure could not be told."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop(sys.stdout.fileno())
    except OSError as error:
        _drop(sys.stdout.fileno())
        failures.line(f"error: the answer cannot be written: {error.strerror}")
        status = status or 1
    try:
        sys.stderr.flush()
    except OSError:
        _drop(sys.stderr.fileno())
    return status


def _drop(descriptor: int) -> None:
    """Point a broken stream at nothing, so that the interpreter's own flush at exit is quiet."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
