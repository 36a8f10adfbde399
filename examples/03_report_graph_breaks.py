"""Compile a training step that looks at its loss in Python, and read where its graph breaks."""

import torch
from torch import nn

import plait


class Classifier(nn.Module):
    """A few layers of the same kind."""

    def __init__(self, width: int, num_layers: int, num_classes: int) -> None:
        """Draw the weights."""
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(num_layers))
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, width) to (B, num_classes)."""
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


def main() -> None:
    """Train for a few steps; the report names each break, its reason and what to do."""
    torch.manual_seed(0)
    model = Classifier(width=16, num_layers=4, num_classes=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def compute_loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = model(inputs)
        loss = nn.functional.cross_entropy(logits, labels)
        value = loss.item()  # Python asks for a number: the graph ends here
        if value > 1.2:
            print(f"loss {value:.3f} is still high")  # and here
        return loss + 1e-3 * logits.square().mean()

    compiled = plait.jit(compute_loss)
    for _ in range(8):
        inputs = torch.randn(8, 16)
        compiled(inputs, inputs[:, :3].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(compiled.report())


if __name__ == "__main__":
    main()
