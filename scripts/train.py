"""Train a small network on scikit-learn's handwritten digits: a template to copy.

accelerate launch scripts/train.py --num_epochs 20 --patience 3
accelerate launch scripts/train.py --config run.yaml
"""

import torch
from datasets import Dataset
from jsonargparse.typing import PositiveFloat, PositiveInt
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from accel_trainer import Trainer
from accel_trainer.tools.options import OptionParser, refusals_in_one_line


def load_data(seed: int) -> tuple[Dataset, Dataset, Dataset]:
    """Return train (64 %), test (16 %, selects the best epoch) and final (20 %, untouched until the end)."""
    digits = load_digits()
    columns = {"pixels": (digits.data / 16).astype("float32"), "label": digits.target}  # (1797, 64) and (1797,)
    data = Dataset.from_dict(columns).with_format("torch").train_test_split(test_size=0.2, seed=seed)
    selection = data["train"].train_test_split(test_size=0.2, seed=seed)
    return selection["train"], selection["test"], data["test"]


def make_model() -> nn.Module:
    """Return a small convolutional network for images of 8 x 8 pixels in 10 classes."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return for each sample whether the most likely class is the right one."""
    return outputs.argmax(dim=1) == targets


def main() -> None:
    """Read the options, train, and evaluate the best weights."""
    parser = OptionParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="samples of one update, over all processes")
    parser.add_argument("--learning_rate", type=PositiveFloat, default=3e-3)
    parser.add_config(num_epochs=40, patience=5, num_micro_batches=2, run_dir="runs/digits")
    options = parser.parse_args()
    config = parser.config_of(options)

    train_data, test_data, final_data = load_data(config.seed)
    train_loader = DataLoader(train_data, options.batch_size, shuffle=True)
    test_loader = DataLoader(test_data, batch_size=256)
    final_loader = DataLoader(final_data, batch_size=256)

    torch.manual_seed(config.seed)  # the initial weights
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    trainer = Trainer(model, optimizer, nn.CrossEntropyLoss(), metrics={"accuracy": accuracy}, config=config)

    history = trainer.fit(train_loader, test_loader)
    scores = trainer.evaluate(final_loader)  # with the weights of the best epoch
    if trainer.is_main_process:
        print(f"Final evaluation: loss {scores['loss']:.4f}, accuracy {scores['accuracy']:.4f}")
        print(f"Best epoch {history.best_epoch} of {history.num_epochs}; files in {config.run_dir}")


if __name__ == "__main__":
    with refusals_in_one_line():
        main()
