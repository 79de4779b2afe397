"""The serial line of a VM: a bounded log ring, interactive sessions.

Listens from before the first instruction of the guest; a guest that floods its line, and a person who does not read,
each cost only themselves. Knows sockets and files, not VMs. Start at :mod:`corral.console.serial`.
"""
