"""Which documents deserve a backward pass: remembered and foreseen losses."""
