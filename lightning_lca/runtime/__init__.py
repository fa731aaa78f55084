"""What everyone needs to know of the process: which Lightning, which ranks, which signals."""
