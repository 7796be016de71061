"""What both engines promise, and what only one can break."""
