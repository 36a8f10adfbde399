"""From graph to schedule: passes, in the order that `levels.py` gives."""
