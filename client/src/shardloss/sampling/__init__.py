"""Candidate samplers in NumPy alone: the only implementation of their formulas, shared by server and trainers.

    zipf = sampling.mixture(sampling.log_uniform(V), sampling.uniform(V), share=0.9)
    drawn = sampling.draw(zipf, num_sampled, unique=True, seed=7, step=0)
    expected = sampling.expected_count(zipf, drawn.sampled, num_sampled, True, drawn.num_tries)

A draw is a pure function of (distribution, num_sampled, unique, seed, step).
"""

from shardloss.sampling.alias import FixedUnigram, fixed_unigram
from shardloss.sampling.class_centers import partial_fc
from shardloss.sampling.distribution import (
    DISTRIBUTIONS,
    Distribution,
    LogUniform,
    Mixture,
    Uniform,
    log_uniform,
    mixture,
    uniform,
)
from shardloss.sampling.draws import Draw, TriesExhausted, all_candidates, draw, expected_count, generator, max_tries
from shardloss.sampling.learned import LearnedCounts

__all__ = [
    "DISTRIBUTIONS",
    "Distribution",
    "Draw",
    "FixedUnigram",
    "LearnedCounts",
    "LogUniform",
    "Mixture",
    "TriesExhausted",
    "Uniform",
    "all_candidates",
    "draw",
    "expected_count",
    "fixed_unigram",
    "generator",
    "log_uniform",
    "max_tries",
    "mixture",
    "partial_fc",
    "uniform",
]
