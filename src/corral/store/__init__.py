"""An ordered key-value store with revisions, transactions, watches and leases; typed objects on top.

One contract (:mod:`corral.store.protocol`), one test suite for every implementation. Knows the model, never what the
objects mean.
"""
