"""The bytes of probe_guest.S, which says what they do."""

from __future__ import annotations

SIZE = 0x10000
RESET_VECTOR = 0xFFF0
EXIT_STATUS = 33
"""QEMU's exit status after the guest wrote 0x10 to isa-debug-exit: (0x10 << 1) | 1."""
STAGES = {
    "": "no instruction of it ran",
    "r": "it stuck in 16-bit code",
    "1": "it ran 16-bit code only",
    "p": "it stuck in 32-bit code",
    "2": "it did not reach 64-bit mode",
    "l": "it stuck in 64-bit code",
    "3": "the first timer interrupt did not wake it",
    "t": "the APIC timer did not wake it",
    "a": "it could not end",
}
"""What the last letter on its serial port means."""

_CODE = bytes.fromhex(
    """
    fa2e660f01165000b072baf803ee66b9c0c62d00664975fcb031baf803ee0f20c00c010f22c066ea5600ffff080066900000000000000000
    ffff0000009bcf00ffff00000093cf00ffff0000009baf001f003000ffff66b810008ed88ec08ed0bc00900000b07066baf803eeb9c0c62d
    004975fdb03266baf803ee31c00fa20f31bf0010000031c0b900180000f3abc7050010000003200000c7050020000003300000c705082000
    0003400000c7051020000003500000c7051820000003600000bf00300000b883000000b9000800008907c747040000000083c70805000020
    00e2edb8001000000f22d80f20e083c8200f22e0b9800000c00f320d000100000f300f20c00d000000800f22c0ea1401ffff1800b06c66ba
    f803eeb9c0c62d00ffc975fcb03366baf803ee31c0bf00800000b900040000f3abbb0a02ffffbf00820000e8dc000000bb1502ffffbf0083
    0000e8cd00000066c7042500700000ff0f48c7042502700000008000000f011c2500700000b011e620e6a0b020e621b028e6a1b004e621b0
    02e6a1b001e621e6a1b0fee621b0ffe6a1b034e643b0a9e640b004e6404531c04531c9be0000e0fec786f0000000ff010000c78650030000
    00070000fbf44183f80572f9b07466baf803eeb0ffe621c786e00300000b000000c7862003000030000200c7868003000040420f00f44183
    f90572f9b06166baf803eeb010e6f4f4ebfd41ffc050b020e6205848cf41ffc1c786b00000000000000048cf66891f66c74702180066c747
    04008ec1eb1066895f06c7470800000000c7470c00000000c3
    """
)
_RESET = bytes.fromhex("ea000000f0")


def rom() -> bytes:
    """The firmware image, 64 KiB."""
    image = bytearray(SIZE)
    image[: len(_CODE)] = _CODE
    image[RESET_VECTOR : RESET_VECTOR + len(_RESET)] = _RESET
    return bytes(image)
