"""Find the parts of a graph that repeat: borders, windows between them, layers made of windows."""
