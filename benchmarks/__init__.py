"""Measure the project against what it stands beside."""
