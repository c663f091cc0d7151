"""The harness: scenarios as data, contenders in turn, records with the machine that they are of."""
