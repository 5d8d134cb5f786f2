"""Faults that commands must survive, and runs that are killed: what is done to them, and what each must end in."""
