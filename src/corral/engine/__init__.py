"""HOW a VM runs on one host: the Engine protocol and its implementations (``qemu``, ``fake``).

May not know the store, projects, images or placement: it is given a :class:`~corral.engine.protocol.Machine` with
files and ports that exist already, and runs it.
"""
