"""All of prediction that touches weights, under any strategy: looks at them, directions to go, jumps and their undoing."""
