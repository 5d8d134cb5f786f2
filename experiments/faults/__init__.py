"""Faults that commands must survive, and runs that are killed, each with the end that it must have."""
