"""What was measured, as tables, in memory and on disk; needs no torch."""
