"""Models and runs on disk: whole or not there, readable by other tools."""
