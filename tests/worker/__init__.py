"""Test the worker, file by file."""
