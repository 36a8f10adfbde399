import pytest
import torch

from plait.cost.accelerators import CLUSTERS, find_cluster
from plait.errors import PlanError


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_has_the_ranks_asked_for_and_plausible_figures(name):
    cluster = find_cluster(name, 64)
    device = cluster.device
    assert cluster.num_ranks == 64
    assert cluster.name == device.name == name
    assert device.peak(torch.bfloat16) >= device.peak(torch.float32)
    assert 0 < device.matrix_efficiency <= 1
    assert 0 < device.attention_efficiency <= 1
    assert cluster.inside.bandwidth_bytes_per_s >= cluster.between.bandwidth_bytes_per_s


def test_an_unknown_cluster_is_refused_with_the_nearest_name():
    with pytest.raises(PlanError, match="Did you mean 'h100'"):
        find_cluster("h10", 8)
