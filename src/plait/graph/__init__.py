"""What is computed: the hierarchical graph of a model, and the schedule that passes make of it."""
