"""Mutated files, odd environments and command lines, by the thousand: ``make fuzz``."""
