"""A LightningModule under a guarded precision plugin; one batch is NaN."""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from harness.integrations.lightning import GuardCallback, guarded_precision


class Regression(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(8, 1)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        inputs, targets = batch
        if index == 5:
            inputs = inputs * torch.nan
        return nn.functional.mse_loss(self.model(inputs), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    lightning.seed_everything(0, verbose=False)
    inputs = torch.randn(160, 8)
    loader = DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True)), batch_size=16)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", plugins=guarded_precision(), callbacks=GuardCallback(),
        gradient_clip_val=1.0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    module = Regression()
    trainer.fit(module, loader)
    print("finite:", all(bool(parameter.isfinite().all()) for parameter in module.parameters()))


if __name__ == "__main__":
    main()
