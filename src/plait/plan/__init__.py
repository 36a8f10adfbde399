"""What lives where: plans, as pure data."""
