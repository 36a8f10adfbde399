"""The way in for PyTorch programs: torch.compile(backend="plait") and plait.jit."""
