"""Shared by every command: running with errors as messages, a time limit, and records."""
