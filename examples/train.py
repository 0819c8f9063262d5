"""Train a next-word model whose output layer is a remote table. Read this file first.

Start a server, then run the example against it:

    shardloss-server serve --workers 2
    python examples/train.py

The task is synthetic, so nothing is downloaded: each word is followed by one of three words, which are fixed at
random. The best possible loss is therefore log(3) = 1.10 nats, and a uniform guess costs log(20,000) = 9.90 nats.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import os

import shardloss
import torch

ADDRESS = os.environ.get("SHARDLOSS_ADDRESS", "127.0.0.1:7070")
NUM_WORDS, NUM_SEEN, DIM = 20_000, 500, 64  # the vocabulary, the words that occur, the width of the model
BATCH, STEPS, LEARNING_RATE = 512, 400, 0.2

torch.manual_seed(0)
successors = torch.randint(NUM_WORDS, (NUM_SEEN, 3))  # the three words that may follow each word

# The output layer: NUM_WORDS rows of DIM numbers and their optimizer state, held by the server's workers.
client = shardloss.connect(ADDRESS, token_file=os.environ.get("SHARDLOSS_TOKEN_FILE"))
name = f"train-example-{os.getpid()}"
table = client.create_table(name, num_classes=NUM_WORDS, dim=DIM, optimizer=shardloss.Adagrad())

# The rest of the model is an ordinary torch module in this process.
backbone = torch.nn.Sequential(torch.nn.Embedding(NUM_SEEN, DIM), torch.nn.Tanh(), torch.nn.Linear(DIM, DIM))

# A head is called like a local loss. Each step it scores the true words and 2,048 sampled ones.
head = table.sampled_softmax(num_sampled=2048, sampler="uniform")

# Two optimizers: torch's for the backbone, the head's for the table. The second one commits the step to the server.
optimizers = [torch.optim.Adagrad(backbone.parameters(), lr=LEARNING_RATE), head.optimizer(lr=LEARNING_RATE)]

for step in range(STEPS + 1):
    words = torch.randint(NUM_SEEN, (BATCH,))
    labels = successors[words, torch.randint(3, (BATCH,))]
    loss = head(backbone(words), labels)
    if step % 100 == 0:
        # The sampled loss is for training. The same table also gives the exact loss over all classes.
        exact = table.evaluate(backbone(words).detach().numpy(), labels.numpy()).loss.mean()
        print(f"step {step:3}: sampled loss {loss.item():5.2f}, exact loss {exact:5.2f} nats")
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()

# Ask the trained table which words follow word 7.
best = table.top_k(backbone(torch.tensor([7])).detach().numpy(), 3)
print("after word 7:", sorted(best.class_ids[0].tolist()), "expected:", sorted(successors[7].tolist()))

client.delete_table(name)
client.close()
