"""Which slot and offset every copy gets: pure, keyed, stable under additions."""
