"""How values and texts from data are written for people, in a page or on a terminal. Standard library only."""
