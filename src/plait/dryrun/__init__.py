"""The dry run: what a schedule would cost, in time and memory, without its devices."""
