"""Training: from text to a model folder, in runs that can be stopped, resumed and repeated."""
