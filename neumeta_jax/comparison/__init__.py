"""Other ways to a family of sizes, on the same budget."""
