"""The tests of pubsub-mw: they mirror `src/`, and meet it as its users do."""
