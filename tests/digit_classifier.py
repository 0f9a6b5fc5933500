"""A judge of generated digits: a small classifier of real digits, and what it says about samples.

It is trained where it is needed (35 s of one core), so that no weights lie in the repository.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPOCHS = 8
BATCH_SIZE = 100
PEAK_LR = 4e-3
MAX_SHIFT = 2  # pixels; digits are moved at random, so that the judge does not learn the 9,000 by heart


def _block(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class DigitClassifier(nn.Module):
    """Images [N, 1, 32, 32] in [-1, 1] to logits [N, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(1, 16, stride=2),
            _block(16, 32, stride=1),
            nn.MaxPool2d(2),
            _block(32, 64, stride=1),
            nn.MaxPool2d(2),
        )
        self.head = nn.Linear(64 * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


@dataclass(frozen=True)
class Judgement:
    """`shares` [10]: the part of the samples found in each class; `confidence`: mean of the largest softmax."""

    shares: Tensor
    confidence: float


def train_digit_classifier(images: Tensor, labels: Tensor, seed: int = 0) -> tuple[DigitClassifier, float]:
    """Train on nine tenths of `images` uint8 [N, 1, 32, 32] and `labels` int64 [N]; every tenth digit is held out.

    Returns the classifier in eval mode and its accuracy on the held-out digits. The global random state stays as it
    was; on one machine the same seed and number of threads give the same classifier.
    """
    held_out = torch.arange(len(images)) % 10 == 9
    train_images, train_labels = images[~held_out], labels[~held_out]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = DigitClassifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
        steps = EPOCHS * -(-len(train_images) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(train_images)).split(BATCH_SIZE):
                logits = classifier(_shifted(to_float(train_images[batch])))
                optimizer.zero_grad()
                F.cross_entropy(logits, train_labels[batch]).backward()
                optimizer.step()
                schedule.step()
    classifier.eval().requires_grad_(False)
    predicted = classifier(to_float(images[held_out])).argmax(1)
    return classifier, (predicted == labels[held_out]).float().mean().item()


def judge(classifier: DigitClassifier, samples: Tensor) -> Judgement:
    """What the classifier sees in `samples` [N, 1, 32, 32] in [-1, 1]."""
    with torch.no_grad():
        probabilities = torch.cat([classifier(part).softmax(1) for part in samples.split(500)])
    confidence, found = probabilities.max(1)
    return Judgement(torch.bincount(found, minlength=10) / len(samples), confidence.mean().item())


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float -1..1."""
    return images.float() / 127.5 - 1.0


def _shifted(images: Tensor) -> Tensor:
    """The batch moved by one random offset; background comes in at the edges."""
    dx, dy = torch.randint(0, 2 * MAX_SHIFT + 1, (2,)).tolist()
    padded = F.pad(images, (MAX_SHIFT,) * 4, value=-1.0)
    return padded[:, :, dy : dy + images.shape[2], dx : dx + images.shape[3]]
