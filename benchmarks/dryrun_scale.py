"""The dry run at scale: how long a price and a search take, and published runs beside predictions.

Capacity is measured in a process of its own for each row, whose memory is its peak resident set.
Published runs stand in `published_runs.py`, with sources; an error is predicted over published time
(or published over predicted rate), less one. Misses are rows like the others.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence

from benchmarks.published_runs import RUNS, PublishedRun
from benchmarks.result import ROOT, Row, run_benchmark
from plait.cost.accelerators import ascend_910b
from plait.cost.clusters import h200
from plait.dryrun.inference import price_inference
from plait.dryrun.job_price import JobPrice
from plait.dryrun.price_job import price_job
from plait.recipes.pretrain import llama2_7b, llama2_70b

_REPEATS = 3
_GIGABYTE_KB = 1e6
_LIMIT = 0.12
_PRICE_405B = [
    *("llama3_405b", "16384", "h100"),
    *("plan.cp=2", "plan.fsdp=64", "plan.recompute=selective"),
]
_SEARCH_70B = ["llama3_70b", "1024", "h100"]


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--child"]:
        _child(sys.argv[2], sys.argv[3:])
        return
    run_benchmark("dryrun_scale", measure)


def measure(quick: bool) -> list[Row]:
    """All rows; the quick run leaves out the search and does each price once."""
    rows = _capacity("price", _PRICE_405B, 1 if quick else _REPEATS)
    rows += _search(0 if quick else _REPEATS)
    rows += _inference()
    rows += _published(RUNS[:4] if quick else RUNS)
    return rows


def error_of(run: PublishedRun, price: JobPrice) -> float:
    """Predicted over published time, less one: above zero is predicted too slow."""
    predicted = {
        "MFU": 1 / price.mfu,
        "tokens/s/GPU": price.num_ranks / price.tokens_per_s,
        "s": price.step_s,
    }[run.unit]
    published = run.published if run.unit == "s" else 1 / run.published
    return predicted / published - 1


def _published(runs: Sequence[PublishedRun]) -> list[Row]:
    prices = [price_job(run.job, run.cluster) for run in runs]
    errors = [error_of(run, price) for run, price in zip(runs, prices, strict=True)]
    rows = [
        _row(f"error of {run.name} [{run.source}]: {run.published:g} {run.unit} published", error)
        for run, error in zip(runs, errors, strict=True)
    ]
    inside = [
        low <= run_s <= high
        for (low, run_s, high) in map(_interval, zip(runs, prices, strict=True))
    ]
    sizes = [abs(error) for error in errors]
    return [
        *rows,
        _row("median absolute error of published runs", statistics.median(sizes)),
        _row("share of published runs within 12 %", _share(x <= _LIMIT for x in sizes), None),
        _row("share of published runs inside the predicted interval", _share(inside), 0.9),
    ]


def _interval(pair: tuple[PublishedRun, JobPrice]) -> tuple[float, float, float]:
    """Low end, published and high end, as times over the predicted one."""
    run, price = pair
    published = 1 / (1 + error_of(run, price))
    return price.low_s / price.step_s, published, price.high_s / price.step_s


def _share(claims) -> float:
    found = list(claims)
    return sum(found) / len(found)


def _row(claim: str, value: float, target: float | None = _LIMIT) -> Row:
    is_error = "error" in claim
    return Row(
        claim=claim,
        unit="",
        target=target if not is_error or value >= 0 else -_LIMIT,
        better="lower" if is_error and value >= 0 else "higher",
        samples=[value],
    )


def _inference() -> list[Row]:
    """Llama 2 over 8 cards, beside the reference's 100 ms to a first token and 50 ms a token."""
    rows = []
    for job in (llama2_7b(), llama2_70b()):
        assert job.model is not None
        for cluster in (h200(8), ascend_910b(8)):
            price = price_inference(job.model, cluster, tp=8, prompt_tokens=512)
            name = f"{job.name}, tp 8 on {cluster.name}, 512 tokens"
            for what, seconds, target in (
                ("first token", price.first_token_s, 0.1),
                ("each further token", price.per_token_s, 0.05),
            ):
                rows.append(
                    Row(
                        claim=f"predicted {what}: {name}",
                        unit="s",
                        target=target,
                        better="lower",
                        samples=[seconds],
                    )
                )
    return rows


def _capacity(what: str, arguments: list[str], repeats: int) -> list[Row]:
    runs = [_run_child(what, arguments) for _ in range(repeats)]
    name = f"{what} of {arguments[0]} on {arguments[1]} {arguments[2]}"
    return [
        Row(
            claim=f"{name}: time, best of {_REPEATS}",
            unit="s",
            target=30.0,
            better="lower",
            samples=[min(run["seconds"] for run in runs)],
        ),
        Row(
            claim=f"{name}: peak memory",
            unit="GB",
            target=4.0,
            better="lower",
            samples=[run["peak_gb"] for run in runs],
        ),
    ]


def _search(repeats: int) -> list[Row]:
    runs = [_run_child("search", _SEARCH_70B) for _ in range(repeats)]
    name = "search of llama3_70b on 1024 h100 within 72 GiB"
    return [
        Row(
            claim=f"{name}: time, best of {_REPEATS}",
            unit="s",
            target=90.0,
            better="lower",
            samples=[min(run["seconds"] for run in runs)] if runs else [],
            full_only=True,
        ),
        Row(
            claim=f"{name}: plans that pass the memory ledger and are priced",
            unit="plans",
            target=2000.0,
            better="higher",
            samples=[run["num_priced"] for run in runs],
            full_only=True,
        ),
        Row(
            claim=f"{name}: peak memory",
            unit="GB",
            target=4.0,
            better="lower",
            samples=[run["peak_gb"] for run in runs],
            full_only=True,
        ),
    ]


def _run_child(what: str, arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.dryrun_scale", "--child", what, *arguments]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - started
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds": seconds}


def _child(what: str, arguments: list[str]) -> None:
    """Price or search, and print what it took."""
    import resource

    from plait.cli.large_job import large_cluster, large_job
    from plait.dryrun.search import search

    recipe, world, cluster, *settings = arguments
    machine = large_cluster(cluster, int(world))
    found: dict[str, float] = {}
    if what == "price":
        found["step_s"] = price_job(large_job(recipe, settings), machine).step_s
    else:
        result = search(large_job(recipe, settings), machine, memory_bytes=72 * 2**30)
        found["num_priced"] = result.num_priced
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(found | {"peak_gb": peak / _GIGABYTE_KB}))


if __name__ == "__main__":
    main()
