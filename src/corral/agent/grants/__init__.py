"""What running VMs are given of this host, following their records: CPU shares through the governor, limits of
disks through the engine.

Nothing here starts or stops a VM; that is :mod:`corral.agent.reconcile`'s.
"""
