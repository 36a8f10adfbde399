"""One script per claim; each prints what it measured and ends with a JSON object."""
