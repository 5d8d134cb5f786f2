"""The kernel benchmark: its calls, their timing, other libraries, the records and the page."""
