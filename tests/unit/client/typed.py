"""A trainer with the types that a checker must infer; `make types` checks this file, and it is never run."""

from typing import assert_type

import shardloss
import torch

client = shardloss.connect("127.0.0.1:7070")
table = client.create_table("words", num_classes=5, dim=3)
hidden, labels = torch.randn(2, 3), torch.tensor([1, 2])
assert_type(table, shardloss.Table)
assert_type(table.softmax()(hidden, labels), torch.Tensor)
assert_type(table.softmax()(hidden, labels, torch.ones(2), scale=torch.ones(1)), torch.Tensor)
assert_type(table.sampled_softmax(3)(hidden, labels), torch.Tensor)
assert_type(table.nce(3)(hidden, labels, hit_ids=(labels, None)), torch.Tensor)
assert_type(table.sigmoid()(hidden, labels), torch.Tensor)
assert_type(table.margin_softmax()(hidden, labels), torch.Tensor)
