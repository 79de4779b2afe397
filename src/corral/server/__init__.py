"""The composition root for the real world: one process that holds the store, the API, the controllers and the agent.

``python -m corral.server --state DIR`` is what ``corral up`` starts. :mod:`~corral.server.home` takes possession of the
state directory, :mod:`~corral.server.world` makes what the agent joins (or :mod:`~corral.server.pretend`, with
``CORRAL_ENGINE=fake``), :mod:`~corral.server.daemon` puts it together and serves. VMs outlive all of it.
"""
