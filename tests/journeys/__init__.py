"""From publisher to client, over real processes, while things break."""
