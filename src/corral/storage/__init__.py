"""Volumes and qcow2: overlays over images, sizes, seeds. One function calls qemu-img, with the format stated."""
