"""Virtual machines by QEMU: probe, command line, process, QMP."""
