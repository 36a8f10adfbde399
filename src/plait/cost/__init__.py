"""How long and how much: what operators cost, and the timeline that they make."""
