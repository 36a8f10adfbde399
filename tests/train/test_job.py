from pathlib import Path

import pytest

from plait.cli.doctor import _cpu_flags
from plait.config import override
from plait.recipes.catalog import find_recipe
from plait.train.job import settled_dtype
from plait.train.run_folder import RunFolder

HAS_PRODUCTS = bool({"avx512_bf16", "amx_bf16"} & _cpu_flags())


def test_auto_is_bfloat16_on_a_gpu():
    assert settled_dtype("auto", "cuda") == "bfloat16"


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="asks the kernel for CPU flags")
@pytest.mark.skipif("avx2" not in _cpu_flags(), reason="knows the flags of x86 only")
def test_auto_is_bfloat16_on_a_cpu_only_where_the_kernel_lists_such_products():
    assert settled_dtype("auto", "cpu") == ("bfloat16" if HAS_PRODUCTS else "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_named_dtype_stays(dtype):
    assert settled_dtype(dtype, "cpu") == settled_dtype(dtype, "cuda") == dtype


@pytest.mark.parametrize("recipe", ["stdlib_demo", "sft"])
def test_a_run_folder_keeps_what_auto_became_so_that_a_resume_elsewhere_does_not_change(
    recipe, tmp_path
):
    job = override(find_recipe(recipe), ["device=cpu"])
    run = RunFolder(tmp_path / "run")
    run.write_job(job)
    assert job.dtype == "auto"
    assert run.read_any_job().dtype == settled_dtype("auto", "cpu")
