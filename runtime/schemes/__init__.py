"""Low-bit formats of expert weights: what a code means, how codes lie in memory."""
