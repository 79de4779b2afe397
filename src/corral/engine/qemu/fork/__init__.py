"""Warm starts: a running machine is frozen into a template, others are forked from it.

``freeze`` is the procedure; ``pages`` finds and copies the memory a process owns, with the help of ``watch``; ``ram``
is a template's memory, ``holder`` the process that keeps it and ``keeper`` its client; ``shelf`` is the directory of
templates. The documentation's page docs/explanation/fork.md tells how they play together.
"""
