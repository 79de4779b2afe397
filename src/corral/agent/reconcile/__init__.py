"""Decides what to do next about one VM. Pure: (record, what is seen, now) → one decision, no I/O, no clock.

Level-triggered: nothing here remembers what was done before. A decision does one thing, the world is looked at again,
and the next one follows, until it says REST. :mod:`~corral.agent.reconcile.table` has a row for each pair of what is
wanted and what the hypervisor says; the rules in it read as sentences: :mod:`~corral.agent.reconcile.down` those on the
way to off and gone, :mod:`~corral.agent.reconcile.up` those of a VM that is to run. :mod:`corral.agent.steps` does what
is decided.
"""

from corral.agent.reconcile.decision import Decision, Do, Wish
from corral.agent.reconcile.seen import OFF_STATES, Gate, GuestView, Seen
from corral.agent.reconcile.table import TABLE, decide

__all__ = ["OFF_STATES", "TABLE", "Decision", "Do", "Gate", "GuestView", "Seen", "Wish", "decide"]
