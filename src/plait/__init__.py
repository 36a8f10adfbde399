"""Plait: one model, one plan, one graph, from pricing a run to serving it."""

from plait.collector import collector_paused

with collector_paused():
    from plait.backend.jit import jit as jit
    from plait.checkpoint.huggingface import load_model as load_model
    from plait.compiler.compile import compile as compile
    from plait.cost import clusters as clusters
    from plait.dryrun.price import price as price
    from plait.dryrun.price_step import price_step as price_step
    from plait.errors import PlaitError as PlaitError
    from plait.executor.run import run as run
    from plait.graph.capture import capture as capture
    from plait.models.decoder import Decoder as Decoder
    from plait.models.decoder import DecoderConfig as DecoderConfig
    from plait.nn.token_layout import TokenLayout as TokenLayout
    from plait.plan.parallel_plan import ParallelPlan as ParallelPlan
del collector_paused
