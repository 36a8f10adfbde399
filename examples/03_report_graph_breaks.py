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
    history: list[float] = []

    def compute_loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(model(inputs), labels)
        if loss > 10:  # the branch depends on data: the graph ends here
            print("the loss is very high")
        history.append(loss.item())  # and here: Python asks for the number
        return loss / labels.numel()

    compiled = plait.jit(compute_loss)
    for _ in range(5):
        inputs = torch.randn(8, 16)
        compiled(inputs, inputs[:, :3].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}")
    print(compiled.report())


if __name__ == "__main__":
    main()
