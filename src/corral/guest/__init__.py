"""Talking to the guest: one interface, two speakers (corral-guest, qemu-guest-agent).

What a guest says is untrusted: bounded, checked, never able to slow another VM. Knows sockets, not VMs.
"""
