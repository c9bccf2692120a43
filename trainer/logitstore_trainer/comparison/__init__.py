"""Two equal students, one on labels alone and one from a store, and everything needed to compare them fairly."""
