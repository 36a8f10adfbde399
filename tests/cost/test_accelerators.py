import pytest
import torch

from plait.cost.accelerators import CLUSTERS, cluster_of_gpu, find_cluster
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


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_cluster_is_found_by_the_name_of_its_gpus(gpu, name):
    assert cluster_of_gpu(gpu) == name
    assert find_cluster(name, 1).device.name == name


@pytest.mark.parametrize("gpu", ["NVIDIA L40S", "NVIDIA H100 NVL", "NVIDIA GeForce RTX 4090", ""])
def test_a_gpu_that_no_cluster_has_is_told_which_are_known(gpu):
    with pytest.raises(
        PlanError, match=r"no figures of a GPU .*Known are A100, H100, GH200, H100 P"
    ):
        cluster_of_gpu(gpu)
