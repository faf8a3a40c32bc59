"""Faults, tried for real: kills, damage, full disks, signals, lies, neighbours.

Each fault is a function that does it to real processes and raises AssertionError where it isn't
survived. ``test_faults.py`` does few of each; ``python -m tests.faults`` many, and prints a table.
"""
