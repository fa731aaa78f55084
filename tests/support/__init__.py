"""What tests share: models and data, one way to train, the twin, and what is compared."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
