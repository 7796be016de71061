"""The Redis engine: its keys, its two doors, its link, and how each takes a fault."""
