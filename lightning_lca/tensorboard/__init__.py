"""The TensorBoard plugin: a tab that shows the record of a finished or running training."""
