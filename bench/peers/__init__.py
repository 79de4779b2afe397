"""What Corral is measured beside: QEMU started by hand, and libvirt. A start of either, and of Corral, as figures."""
