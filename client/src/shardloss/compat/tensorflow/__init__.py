"""tf.nn.sampled_softmax_loss, nce_loss and the samplers with TensorFlow 2's signatures; the losses use a remote table.

    opt = tensorflow.optimizer(table, lr=0.1)
    loss = tensorflow.sampled_softmax_loss(table, table, labels, inputs, num_sampled, num_classes)    # [N]
    loss.mean().backward()
    opt.step()
    with torch.no_grad():
        exact = tensorflow.full_softmax_loss(table, table, labels, inputs)    # [N], for evaluation

weights and biases are the remote table itself; labels and inputs are torch tensors. All losses of a step are one
commit. The samplers, in_top_k and compute_accidental_hits need no table. The module `v1` has TensorFlow 1's order of
arguments. docs/tensorflow.md describes each argument.
"""

from shardloss.compat.head import optimizer
from shardloss.compat.tensorflow import v1
from shardloss.compat.tensorflow.candidate_sampler import (
    AllCandidateSampler,
    CandidateSampler,
    FixedUnigramCandidateSampler,
    LearnedUnigramCandidateSampler,
    LogUniformCandidateSampler,
    SampledCandidates,
    UniformCandidateSampler,
)
from shardloss.compat.tensorflow.sampled import (
    SampledTriple,
    full_sigmoid_loss,
    full_softmax_loss,
    nce_loss,
    sampled_softmax_loss,
)
from shardloss.compat.tensorflow.samplers import (
    AccidentalHits,
    all_candidate_sampler,
    compute_accidental_hits,
    fixed_unigram_candidate_sampler,
    learned_unigram_candidate_sampler,
    log_uniform_candidate_sampler,
    uniform_candidate_sampler,
)
from shardloss.compat.tensorflow.top_k import in_top_k

__all__ = [
    "AccidentalHits",
    "AllCandidateSampler",
    "CandidateSampler",
    "FixedUnigramCandidateSampler",
    "LearnedUnigramCandidateSampler",
    "LogUniformCandidateSampler",
    "SampledCandidates",
    "SampledTriple",
    "UniformCandidateSampler",
    "all_candidate_sampler",
    "compute_accidental_hits",
    "fixed_unigram_candidate_sampler",
    "full_sigmoid_loss",
    "full_softmax_loss",
    "in_top_k",
    "learned_unigram_candidate_sampler",
    "log_uniform_candidate_sampler",
    "nce_loss",
    "optimizer",
    "sampled_softmax_loss",
    "uniform_candidate_sampler",
    "v1",
]
