"""Facts about this machine and its processes: CPUs, memory, boot id, pidfd."""
