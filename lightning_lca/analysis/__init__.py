"""What the tables say: numpy in, numpy out; needs no torch."""
