"""All of prediction that touches weights, under any strategy: statistics of them, directions, jumps and their undoing."""
