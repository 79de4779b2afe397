"""What is run inside a guest around its freezing: the only places where Corral tells a guest's own services something.

Plain POSIX shell, for busybox and dash alike. Whoever has none of the services named here is left as it is.
"""

from __future__ import annotations

import asyncio

from corral.errors import CorralError
from corral.guest.protocol import Command, Ended, Guest, Output

UNMANAGE = """
# A fork's card gets its address from Corral. systemd-networkd would ask for another one as soon as its MAC is new.
if [ -d /run/systemd/netif/links ] && command -v networkctl >/dev/null; then
  mkdir -p /run/systemd/network
  printf '[Match]\\nType=ether\\n[Link]\\nUnmanaged=yes\\n' >/run/systemd/network/00-corral.network
  networkctl reload
  tries=0
  while networkctl --no-legend --no-pager list | grep ether | grep -qv unmanaged && [ $tries -lt 40 ]; do
    tries=$((tries + 1))
    sleep 0.1
  done
fi
"""
REST = """
# What only looks after the network has nothing to do in a fork, and would wake in each at the change of clock, name and
# MAC, for a quarter of what the fork costs. Only where D-Bus starts it again for whoever asks.
for name in network resolve; do
  unit=$(readlink -f /etc/systemd/system/dbus-org.freedesktop.${name}1.service 2>/dev/null)
  [ -f "$unit" ] || continue
  unit=${unit##*/}
  systemctl stop "${unit%.service}.socket" "$unit" >/dev/null 2>&1
done
"""
HOOKS = "/etc/corral/on-fork.d"
SETTLE = f"""
# Until the service manager has nothing left to start; what failed to start stays as it is.
if [ -d /run/systemd/system ]; then
  timeout 120 systemctl is-system-running --wait >/dev/null 2>&1
fi
{UNMANAGE}
{REST}
if [ -d {HOOKS} ] && [ -n "$(ls -A {HOOKS})" ]; then echo hooks; fi
sync
exit 0
"""
"""Before a guest that was booted for it is frozen. Prints ``hooks`` when its image has some."""
LEAVE = f"""
{UNMANAGE}
exit 0
"""
"""In a fork of a running VM, before it is told who it is: its parent's services know nothing of this."""
RUN_HOOKS = f"""
bad=0
for hook in {HOOKS}/*; do
  [ -x "$hook" ] || continue
  "$hook" || {{ echo "$hook ended with status $?" >&2; bad=1; }}
done
exit $bad
"""
"""In every fork whose image has such programs, when it knows who it is and before it is on the network."""
MAX_OUTPUT = 4096


async def run(guest: Guest, script: str, timeout_s: float, what: str) -> str:
    """Run a script in the guest; what it printed. Raises CorralError ``guest``, Unavailable ``unresponsive``."""
    process = await guest.run(Command(argv=("sh", "-c", script)))
    said = b""
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in process.output():
                if isinstance(piece, Output):
                    said = (said + piece.data)[-MAX_OUTPUT:]
                elif isinstance(piece, Ended) and piece.status:
                    words = said.decode(errors="replace").strip()[-300:]
                    raise CorralError(f"{what} ended with status {piece.status}: {words}", code="guest")
    except TimeoutError as error:
        raise CorralError(f"{what} took longer than {timeout_s:g} s", code="guest") from error
    finally:
        await process.close()
    return said.decode(errors="replace")
