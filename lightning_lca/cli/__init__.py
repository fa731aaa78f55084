"""What a person types: ``lightning-lca``."""
