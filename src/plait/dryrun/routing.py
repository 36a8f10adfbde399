"""How many rows the busiest rank's experts get, over the mean."""

import math
from statistics import NormalDist

from plait.dryrun.model_source import ModelSource
from plait.dryrun.pretrain_job import PretrainJob


def expert_load(job: PretrainJob, source: ModelSource, num_tokens: float) -> float:
    """Rows of the busiest rank over the mean; num_tokens: those that the ranks of ep route at once.

    At a percentile, tokens choose independently and all experts alike: of each token's k experts of
    E, a rank with E / ep of them has a hypergeometric number, of mean k / ep and of variance
    k / ep (1 - 1 / ep) (E - k) / (E - 1). Sums over many tokens are normal, and the most of ep
    ranks, taken as independent, stays below what each stays below with the ep-th root of the
    probability. Real routers prefer some experts, so this is a lower bound.
    """
    ep = job.plan.ep
    if job.expert_percentile is None or ep == 1:
        return job.expert_load
    mean = num_tokens * source.expert_rows / ep
    spread = (source.num_experts - source.expert_rows) / max(1, source.num_experts - 1)
    deviation = math.sqrt(mean * (1 - 1 / ep) * spread)
    below = NormalDist().inv_cdf((job.expert_percentile / 100) ** (1 / ep))
    return max(1.0, 1.0 + below * deviation / mean)
