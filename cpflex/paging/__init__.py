"""Keys and values in pages over many ranks: who holds which page, what a step of new tokens reads, and the step itself."""
