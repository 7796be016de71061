"""The realtime server, each file of it under the test file of the same name."""
