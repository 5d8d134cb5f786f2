"""The kernel benchmark: its calls, how they are timed, other libraries, records and page."""
