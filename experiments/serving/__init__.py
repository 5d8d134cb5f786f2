"""Requests and answers of `generate.py` as texts."""
