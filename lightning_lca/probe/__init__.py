"""The loss surface of a LightningModule, evaluated without a side effect."""
