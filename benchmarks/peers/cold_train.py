"""What `python train.py` is: a small network on handwritten digits, from the interpreter to the first step.

Prints the time at which the first step had finished, and ends. Written as a person would write it, with
autocast, and without anything of this project.
"""

import time

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

digits = load_digits()
pixels = torch.from_numpy(digits.data / 16.0).float()
labels = torch.from_numpy(digits.target.astype(np.int64))
loader = DataLoader(TensorDataset(pixels, labels), batch_size=32, shuffle=True)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
criterion = nn.CrossEntropyLoss()
for data, target in loader:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(model(data), target)
    loss.backward()
    optimizer.step()
    break
print(time.time(), flush=True)
