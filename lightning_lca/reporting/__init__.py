"""What a running training shows: scalars, figures, distributions, and its record."""
