"""What docs/deploy/ gives to copy, used as it is."""
