"""Plait: one model, one plan, one graph, from pricing a run to serving it."""

from plait.backend.jit import jit as jit
from plait.checkpoint.huggingface import load_model as load_model
from plait.errors import PlaitError as PlaitError
from plait.models.decoder import Decoder as Decoder
from plait.models.decoder import DecoderConfig as DecoderConfig
from plait.nn.token_layout import TokenLayout as TokenLayout
