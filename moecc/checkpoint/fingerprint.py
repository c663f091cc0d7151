"""Recognise a file of gigabytes by a megabyte of it."""

import hashlib
from pathlib import Path

SAMPLES = 16
LENGTH = 1 << 16


def fingerprint(file: Path) -> str:
    """Hash a file's size and 16 evenly spaced samples of 64 KiB, its first and last bytes included.

    Training, merging or quantizing changes every tensor and so the samples; a change of a single
    expert can escape them.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for number in range(SAMPLES):
            opened.seek(max(0, size - LENGTH) * number // (SAMPLES - 1))
            digest.update(opened.read(LENGTH))
    return digest.hexdigest()
