"""tfrs.tasks.Retrieval of TensorFlow Recommenders, with rows of a remote table as candidates.

    task = tfrs.Retrieval(temperature=0.1)
    opt = tfrs.optimizer(table, lr=0.1)
    loss = task(query_tower(features), table.embeddings(movie_ids))    # [], the sum over the batch
    loss.backward()
    opt.step()

The query tower is the trainer's own torch module; the candidate tower is the table. See docs/tensorflow.md.
"""

from shardloss.compat.head import optimizer
from shardloss.compat.tfrs.retrieval import Retrieval

__all__ = ["Retrieval", "optimizer"]
