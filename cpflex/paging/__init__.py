"""Keys and values in pages over many ranks: who holds what, what a step of new tokens reads, and the step."""
