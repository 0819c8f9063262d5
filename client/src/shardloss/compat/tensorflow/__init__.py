"""tf.nn.sampled_softmax_loss with TensorFlow 2's signature, over a remote table; the v1 order is in `v1`.

    opt = tensorflow.optimizer(table, lr=0.1)
    loss = tensorflow.sampled_softmax_loss(table, table, labels, inputs, num_sampled, num_classes)    # [N]
    loss.mean().backward()
    opt.step()

weights and biases are the remote table itself; labels and inputs are torch tensors.
"""

from shardloss.compat.tensorflow import v1
from shardloss.compat.tensorflow.sampled import SampledTriple, optimizer, sampled_softmax_loss

__all__ = ["SampledTriple", "optimizer", "sampled_softmax_loss", "v1"]
