"""Mathematics on tensors: quadrature, credit, groups and their sums; no Lightning in here."""
