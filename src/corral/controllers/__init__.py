"""Loops over the store that decide: placement, collection of what is over. Never touch an engine or an agent.

They write intent by compare-and-swap and may be run twice: whoever comes second finds nothing to do.
"""
