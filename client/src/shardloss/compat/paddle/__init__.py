"""The softmax losses of paddle.nn.functional with Paddle 3.3's signatures, over torch tensors and remote tables.

    opt = paddle.optimizer(table, lr=0.1)
    loss = paddle.cross_entropy(table.logits(hidden), label)  # hidden [..., D]; [..., V] is never materialised
    loss.backward()
    opt.step()

If the logits are those of a table (`Table.logits`), the service computes the loss and trains the table; if they are a
dense torch tensor, torch computes the loss. docs/paddle.md lists every argument and the intended differences.
"""

from shardloss.compat.head import optimizer
from shardloss.compat.paddle.class_centers import class_center_sample
from shardloss.compat.paddle.cross_entropy import cross_entropy, softmax_with_cross_entropy
from shardloss.compat.paddle.margin import margin_cross_entropy
from shardloss.compat.paddle.sampled import sampled_softmax_with_cross_entropy

__all__ = [
    "class_center_sample",
    "cross_entropy",
    "margin_cross_entropy",
    "optimizer",
    "sampled_softmax_with_cross_entropy",
    "softmax_with_cross_entropy",
]
