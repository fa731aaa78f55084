/** A program for an empty log directory: it runs as it is, and makes a first run there. */

/** The program, in Python; it logs to the directory. */
export function firstRun(directory) {
  // A string of JSON is one of Python's, too.
  const where = JSON.stringify(directory ?? "lightning_logs");
  return `import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lca import LCACallback


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 32)
        self.second = nn.Linear(32, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.second(torch.tanh(self.first(x))), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


x = torch.randn(1024, 2)
data = TensorDataset(x, x.prod(1, keepdim=True))
trainer = pl.Trainer(
    max_epochs=10,
    logger=TensorBoardLogger(${where}, name="first"),
    log_every_n_steps=1,
    callbacks=[LCACallback()],
)
trainer.fit(Net(), DataLoader(data, batch_size=64, shuffle=True))
`;
}
