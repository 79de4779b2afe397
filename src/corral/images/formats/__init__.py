"""One module per disk format: is this header one that qemu-img may be shown? Pure functions over bounded reads."""
