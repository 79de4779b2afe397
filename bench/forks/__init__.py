"""The parts of bench/fork.py: the ways to start a guest, what is measured of them, and how forks do in numbers."""
