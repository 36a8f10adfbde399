from dataclasses import replace

import pytest
import torch

from plait.cost.accelerators import find_cluster
from plait.cost.simulate import beside_s
from plait.dryrun.compare import compare
from plait.dryrun.data_parallel import owners_of
from plait.dryrun.job_report import job_report, pipeline_trace
from plait.dryrun.model_source import decoder_source, module_source
from plait.dryrun.piece import Shape
from plait.dryrun.pieces import PieceStore
from plait.dryrun.price_job import price_job
from plait.dryrun.routing import expert_load
from plait.dryrun.work import Part
from plait.errors import GraphError, PlanError
from plait.models.decoder import Decoder
from plait.nn.experts import ExpertSettings
from plait.plan.parallel_plan import ParallelPlan, Pipeline, Recompute
from tests.dryrun.small_job import CONFIG, JOB

LAYER = 4 * 512 * 512 + 3 * 512 * 1024


@pytest.fixture(scope="module")
def cluster():
    return find_cluster("h100", 8)


def test_prices_of_two_jobs_compare_by_class_of_ranks(cluster):
    plan = ParallelPlan(fsdp=4, pp=2)
    small, large = (
        price_job(replace(JOB, plan=plan, gradient_bytes=each), cluster).to_dict()
        for each in (2, 4)
    )
    found = {(each.group, each.name): each.error for each in compare(small, large)}
    for rank in "01":
        group = f"memory of pipeline rank {rank}"
        assert found[group, "gradients"] == -0.5
        assert found[group, "parameters"] == 0
        assert -0.5 < found[group, "peak"] < 0
    assert found["step", "step_s"] == pytest.approx(0, abs=0.1)
    assert ("parts_s", "bubble_s") in found
    other = price_job(JOB, cluster).to_dict()  # which has no second pipeline rank
    assert {x.group for x in compare(small, other) if "memory" in x.group} == {
        "memory of pipeline rank 0"
    }


def test_the_workspace_of_products_is_that_of_the_generation(cluster):
    def context(name):
        (one,) = price_job(JOB, find_cluster(name, 8)).classes
        return one.ledger.bytes_by_kind["context"]

    hopper = context("h100")
    assert context("b200") == hopper
    assert hopper - context("a100") == 32 * 2**20 - 8_519_680
    assert context("mi300x") - hopper == 96 * 2**20


def test_model_flops_are_six_for_each_weight_and_six_for_each_pair_and_channel(cluster):
    """PaLM, arXiv 2204.02311, appendix B; causal pairs once."""
    products = 6 * (8 * LAYER + 512 * 4096)
    attention = 6 * 8 * 512 * (1024 + 1)
    assert price_job(JOB, cluster).flops_per_token == pytest.approx(products + attention)


def test_model_flops_do_not_depend_on_the_plan(cluster):
    base = price_job(JOB, cluster).flops_per_token
    plans = [
        ParallelPlan(tp=4, sp=True, fsdp=2),
        ParallelPlan(tp=2, fsdp=4, recompute=Recompute.FULL),
        ParallelPlan(cp=2, fsdp=4),
        ParallelPlan(pp=2, fsdp=4),
    ]
    for plan in plans:
        got = price_job(replace(JOB, plan=plan), cluster).flops_per_token
        assert got == pytest.approx(base, rel=1e-3), plan


def test_the_states_of_parameters_follow_a_closed_form(cluster):
    """Rajbhandari et al. 2020, arXiv 1910.02054: 2 + 4 + 12 bytes, the last over all ranks."""
    elements = 8 * (LAYER + 2 * 512) + 512 + 2 * 512 * 4096
    ledger = price_job(JOB, cluster).fullest.ledger.bytes_by_kind
    assert ledger["parameters"] == 2 * elements
    assert ledger["gradients"] == 4 * elements
    assert ledger["optimizer state"] == 12 * elements / 8
    sharded = price_job(replace(JOB, plan=ParallelPlan(fsdp=8, reshard=True)), cluster)
    assert sharded.fullest.ledger.bytes_by_kind["parameters"] == 2 * elements / 8


def test_parts_of_the_step_add_up(cluster):
    for plan in (
        ParallelPlan(fsdp=8),
        ParallelPlan(fsdp=8, reshard=True),
        ParallelPlan(tp=2, sp=True, pp=2, fsdp=2),
    ):
        price = price_job(replace(JOB, plan=plan), cluster)
        assert sum(s for _, s in price.parts.shares()) == pytest.approx(price.step_s, rel=0.01)
        assert price.low_s < price.step_s < price.high_s


def test_full_recompute_costs_a_forward_and_frees_activations(cluster):
    base = price_job(JOB, cluster)
    full = price_job(replace(JOB, plan=ParallelPlan(fsdp=8, recompute="full")), cluster)
    assert full.parts.matrix_s > 1.2 * base.parts.matrix_s
    kind = "saved activations"
    assert full.fullest.ledger.bytes_by_kind[kind] < base.fullest.ledger.bytes_by_kind[kind] / 3


def test_several_sequences_are_priced_from_two_captures_as_if_captured_themselves(cluster):
    store = PieceStore(decoder_source(CONFIG), cluster)
    shape = Shape(sequence_length=256)
    scaled = store.find(shape, 4.0).layers["layer"]
    twice = store.find(replace(shape, sequence_length=1024)).layers["layer"]

    def flops(piece, sequences):
        return sum(
            work.at(sequences).cost.flops
            for work in piece.forward
            if work.low.cost.kind.value == "matrix"
        )

    assert flops(scaled, 4.0) == flops(twice, 1.0) == 2 * 1024 * LAYER
    assert scaled.saved.at(4.0) == pytest.approx(2 * scaled.saved.at(2.0), rel=0.01)


def test_a_share_of_a_sequence_costs_that_share(cluster):
    store = PieceStore(decoder_source(CONFIG), cluster)
    shape = Shape(sequence_length=1024)
    part, whole = (store.find(shape, x).layers["layer"] for x in (0.25, 1.0))
    for share, one in zip(part.forward, whole.forward, strict=True):
        wanted = one.at(1.0).cost.flops / 4
        assert share.at(0.25).cost.flops == pytest.approx(wanted, rel=0.01)


def test_pipeline_ranks_fall_into_classes_by_stages_and_what_they_hold(cluster):
    plan = ParallelPlan(pp=4, fsdp=2)
    price = price_job(replace(JOB, plan=plan), cluster)
    assert [each.pipeline_ranks for each in price.classes] == [(0,), (1,), (2,), (3,)]
    assert [each.in_flight for each in price.classes] == [4, 3, 2, 1]
    assert sum(each.num_ranks for each in price.classes) == 8
    gpipe = price_job(replace(JOB, plan=replace(plan, pipeline=Pipeline.GPIPE)), cluster)
    assert [each.pipeline_ranks for each in gpipe.classes] == [(0,), (1, 2), (3,)]


def test_offload_takes_activations_away(cluster):
    base = price_job(JOB, cluster).fullest.ledger.bytes_by_kind["saved activations"]
    half = price_job(replace(JOB, offload=0.5), cluster)
    assert half.fullest.ledger.bytes_by_kind["saved activations"] == pytest.approx(base / 2)


def test_experts_are_shared_over_ep_and_exchange_their_tokens(cluster):
    experts = ExpertSettings(num_experts=8, experts_per_token=2, intermediate_size=1024)
    job = replace(JOB, model=replace(CONFIG, family="mixtral", experts=experts))
    alone = price_job(job, cluster)
    shared = price_job(replace(job, plan=ParallelPlan(fsdp=8, ep=8)), cluster)
    weights = 8 * 8 * 3 * 512 * 1024
    kinds = [each.fullest.ledger.bytes_by_kind["parameters"] for each in (alone, shared)]
    assert kinds[0] - kinds[1] == pytest.approx(2 * weights * 7 / 8)
    temporaries = [x.fullest.ledger.bytes_by_kind["temporaries"] for x in (alone, shared)]
    stack = 2 * 8 * 512 * 1024  # the gradient of one matrix of all experts of a layer
    assert temporaries[0] - temporaries[1] >= stack * 7 / 8
    assert shared.parts.exposed_s > 0
    loaded = price_job(replace(job, plan=ParallelPlan(fsdp=8, ep=8), expert_load=1.5), cluster)
    assert loaded.step_s > shared.step_s


def test_with_sp_the_ranks_of_tp_share_experts_and_route_their_own_tokens(cluster):
    experts = ExpertSettings(num_experts=8, experts_per_token=2, intermediate_size=1024)
    job = replace(JOB, model=replace(CONFIG, family="mixtral", experts=experts), batch_size=16)
    weights = 2 * 8 * 8 * 3 * 512 * 1024

    def parameters(plan):
        price = price_job(replace(job, plan=plan), cluster)
        return price.fullest.ledger.bytes_by_kind["parameters"]

    whole = parameters(ParallelPlan(tp=4, sp=True, dp=2))
    shared = parameters(ParallelPlan(tp=4, sp=True, dp=2, ep=4))
    assert whole - shared == pytest.approx(weights * 3 / 4)
    # The captured layer sums the gradients of its three stacks over tp; where their copies lie is
    # for ep to say, so these messages are priced with those of dp.
    shape = Shape(sequence_length=1024, tp=4, sp=True)
    layer = PieceStore(decoder_source(job.model), cluster).find(shape, 1).layers
    work = [each.low for piece in layer.values() for each in piece.backward]
    sums = [each for each in work if each.collective and each.part is Part.EXPERTS]
    assert [each.num_bytes for each in sums] == [2 * 8 * 512 * 1024] * 3


def test_a_percentile_of_the_load_is_that_of_drawn_routings():
    experts = ExpertSettings(num_experts=16, experts_per_token=2, intermediate_size=64)
    job = replace(JOB, plan=ParallelPlan(fsdp=8, ep=8), expert_percentile=90.0)
    source = decoder_source(replace(CONFIG, family="mixtral", experts=experts))
    generator = torch.Generator().manual_seed(0)
    loads = []
    for _ in range(400):
        chosen = torch.rand(512, 16, generator=generator).topk(2).indices // 2  # 2 experts a rank
        loads.append(chosen.flatten().bincount(minlength=8).max().item() / 128)
    drawn = torch.tensor(loads).quantile(0.9).item()
    # 400 draws of a maximum: its percentile is known to about a tenth of what lies above 1.
    assert expert_load(job, source, 512) - 1 == pytest.approx(drawn - 1, rel=0.1)


def test_two_stream_closed_form_of_a_message_beside_computation():
    assert beside_s(10.0, 2.0, 1.0) == 10.0
    assert beside_s(10.0, 2.0, 1.25) == pytest.approx(10.0 + 2.0 - 2.0 / 1.25)
    assert beside_s(1.0, 5.0, 1.25) == 5.0


def test_ranks_of_cp_own_parameters_only_together_with_fsdp():
    assert owners_of(ParallelPlan(fsdp=4, cp=2, dp=3)).shards == 8
    alone = owners_of(ParallelPlan(cp=2, dp=3))
    assert (alone.shards, alone.copies) == (1, 6)


def test_a_plan_that_does_not_divide_the_model_names_number_and_legal_ones(cluster):
    with pytest.raises(PlanError, match=r"tp=3 does not divide num_heads=8.*Choose tp from 1"):
        price_job(replace(JOB, plan=ParallelPlan(tp=3)), find_cluster("h100", 3))


def test_micro_batches_that_contradict_the_batch_are_refused(cluster):
    with pytest.raises(PlanError, match="makes 8"):
        price_job(replace(JOB, plan=ParallelPlan(fsdp=8, num_micro_batches=3)), cluster)


def test_a_cluster_that_is_too_small_says_what_is_missing_by_kind(cluster):
    tiny = replace(cluster, device=replace(cluster.device, memory_bytes=2**28))
    price = price_job(JOB, tiny)
    assert not price.fits
    assert "GiB are missing" in price.binding
    assert "saved activations" in price.binding


def test_shapes_that_depend_on_data_are_refused(cluster):
    def loss(model, tokens):
        hidden = model(tokens)
        return model.loss(hidden[tokens > 3][None], tokens[tokens > 3][None])

    source = replace(decoder_source(CONFIG), loss=loss)
    with pytest.raises(GraphError):
        price_job(JOB, cluster, source=source)


def test_a_job_without_a_model_is_refused(cluster):
    with pytest.raises(PlanError, match="has no model"):
        price_job(replace(JOB, model=None), cluster)


def test_a_report_says_rates_memory_and_what_binds(cluster):
    price = price_job(replace(JOB, plan=ParallelPlan(pp=2, fsdp=4)), cluster)
    text = job_report(price, dollars_per_rank_hour=2.0)
    for word in ("MFU", "tokens/s", "bound by", "pipeline rank 0", "for a billion tokens"):
        assert word in text
    rows = [event for event in pipeline_trace(price)["traceEvents"] if event["ph"] == "X"]
    assert len(rows) == 2 * 2 * price.num_micro_batches
    hours = 1e9 / price.tokens_per_s / 3600
    assert price.dollars_per_billion_tokens(2.0) == pytest.approx(hours * 8 * 2.0)


WIDE = replace(
    CONFIG,
    hidden_size=4096,
    intermediate_size=8192,
    num_heads=32,
    num_kv_heads=32,
    head_size=128,
    max_positions=16384,
)


@pytest.mark.parametrize(
    ("cp", "micro_batch_size"),
    [(1, 1), (2, 1), (1, 2), (2, 3)],
    ids=["tokens", "a share of the tokens", "batch", "shares of three sequences"],
)
def test_replicas_hide_messages_of_a_wide_layer(cp, micro_batch_size):
    cluster = find_cluster("h100", 8 * cp)
    plan = ParallelPlan(tp=8, sp=True, cp=cp)
    job = replace(JOB, model=WIDE, plan=plan, sequence_length=4096 * cp)
    job = replace(job, micro_batch_size=micro_batch_size, batch_size=6)
    whole = price_job(job, cluster)
    split = price_job(replace(job, plan=replace(plan, replicas=2)), cluster)
    assert split.parts.exposed_s < 0.7 * whole.parts.exposed_s
    # The same products and the same attention, with fewer rows at a time.
    assert 1 <= split.parts.matrix_s / whole.parts.matrix_s < 1.1
    assert split.parts.attention_s == pytest.approx(whole.parts.attention_s, rel=0.05)


def test_replicas_hide_messages_where_nothing_else_runs_beside_them():
    cluster = find_cluster("h100", 8)
    job = replace(JOB, model=WIDE, plan=ParallelPlan(tp=8, sp=True), sequence_length=2048)
    job = replace(job, overlap=False)
    whole = price_job(job, cluster)
    split = price_job(replace(job, plan=replace(job.plan, replicas=2)), cluster)
    assert split.parts.exposed_s < whole.parts.exposed_s


SIZES_FOR_TRANSFORMERS = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
"""Those of CONFIG."""


@pytest.fixture(scope="module")
def llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    from plait.dryrun.model_source import hugging_face_source

    return hugging_face_source(transformers.LlamaConfig(**SIZES_FOR_TRANSFORMERS))


def test_a_model_of_transformers_is_priced_too(cluster, llama_of_transformers):
    own = price_job(JOB, cluster)
    theirs = price_job(replace(JOB, model=None), cluster, source=llama_of_transformers)
    # It gives attention a mask instead of saying that it is causal: kernels see every pair.
    masked = 6 * 8 * 512 * (1024 - 1)
    assert theirs.flops_per_token == pytest.approx(own.flops_per_token + masked, rel=0.02)
    assert theirs.step_s == pytest.approx(own.step_s, rel=0.4)


def test_the_layers_of_a_model_of_transformers_send_what_ours_send(cluster, llama_of_transformers):
    """Its first layer also takes its own tokens out of all; the others do not."""
    shape = Shape(sequence_length=1024, tp=2, sp=True)

    def sent(source):
        (layer,) = PieceStore(source, cluster).find(shape).layers.values()
        works = [each.at(1.0) for each in (*layer.forward, *layer.backward)]
        large = [each for each in works if each.num_bytes > 100_000]
        return sorted((each.collective.value, each.num_bytes) for each in large)

    ours = sent(decoder_source(CONFIG))
    assert len(ours) == 8
    assert sent(llama_of_transformers) == ours


def test_a_source_makes_a_model_of_chosen_layers_without_memory():
    model = decoder_source(CONFIG).make((0, 5), 128)
    assert isinstance(model, Decoder)
    assert len(model.layers) == 2
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def attention_of(cluster, **options):
    shape = Shape(sequence_length=1024, **options)
    layer = PieceStore(decoder_source(CONFIG), cluster).find(shape).layers["layer"]
    found = [
        work.at(1.0)
        for work in (*layer.forward, *layer.backward)
        if work.low.cost.kind.value == "attention"
    ]
    return layer, found


def test_attention_that_is_not_fused_is_priced_by_the_whole_square_of_scores(cluster):
    """Korthikanti et al. 2022, arXiv 2205.05198, section 4.1: it keeps 5 a s^2 bytes."""
    scores = 8 * 1024 * 1024
    fused, _ = attention_of(cluster)
    kept, (forward, backward) = attention_of(cluster, attention="unfused")
    again, (_, recomputed) = attention_of(cluster, attention="recomputed")
    product = 2 * scores * 64
    assert [sum(x.flops for x in work.kernels) for work in (forward, backward, recomputed)] == [
        2 * product,
        4 * product,
        6 * product,
    ]
    assert kept.saved.at(1.0) - fused.saved.at(1.0) == 5 * scores
    assert again.saved.at(1.0) == fused.saved.at(1.0)
    pairs = 8 * 1024 * 1025 // 2  # of a query with itself and all before: causal, as in MFU
    assert forward.cost.flops == 2 * (2 * pairs * 64)


def test_an_optimizer_of_single_operators_takes_longer_by_their_bytes(cluster):
    fused, foreach = (
        price_job(replace(JOB, fused_optimizer=is_fused), cluster) for is_fused in (True, False)
    )
    ratio = foreach.parts.optimizer_s / fused.parts.optimizer_s
    assert ratio == pytest.approx(92 / 34)


def test_alternate_recompute_computes_every_second_product_again(cluster):
    """Of query, key, value, output, gate, up and down: key, output and up."""
    none = price_job(JOB, cluster)
    alternate = price_job(replace(JOB, plan=ParallelPlan(fsdp=8, recompute="alternate")), cluster)
    full = price_job(replace(JOB, plan=ParallelPlan(fsdp=8, recompute="full")), cluster)
    store = PieceStore(decoder_source(CONFIG), cluster)

    def flops(policy):
        layer = store.find(Shape(sequence_length=1024, recompute=policy)).layers["layer"]
        works = [each.at(1.0).cost for each in layer.backward]
        return sum(each.flops for each in works if each.kind.value == "matrix")

    again = 2 * 1024 * (2 * 512 * 512 + 512 * 1024)
    assert flops(Recompute.ALTERNATE) - flops(Recompute.NONE) == again
    steps = [each.step_s for each in (none, alternate, full)]
    assert steps == sorted(steps)
    peaks = [each.peak_bytes for each in (full, alternate, none)]
    assert peaks == sorted(peaks)


def test_a_price_names_what_holds_the_memory_and_the_line_that_made_it(cluster):
    price = price_job(replace(JOB, model=replace(CONFIG, vocab_size=32_768)), cluster)
    kinds = price.fullest.ledger.bytes_by_kind
    assert sum(each.num_bytes for each in price.largest) <= price.peak_bytes
    sizes = [each.num_bytes for each in price.largest]
    assert sizes == sorted(sizes, reverse=True)
    saved = [each for each in price.largest if each.kind == "saved activations"]
    assert saved[0].num_bytes <= kinds["saved activations"]
    assert any(".py:" in each.source for each in saved)
    table = [each for each in price.largest if each.name == "embed_tokens.weight"]
    state = 2 + 4 + 12 / 8
    assert table[0].num_bytes == pytest.approx(state * 32_768 * 512, rel=0.01)


def test_an_operator_without_a_cost_is_priced_by_its_bytes_and_named(cluster):
    @torch.library.custom_op("plait_test::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    mystery.register_fake(torch.empty_like)
    mystery.register_autograd(lambda ctx, gradient: gradient * 2)

    def loss(model, tokens):
        return model.loss(mystery(model(tokens)), tokens) / tokens.numel()

    source = replace(decoder_source(CONFIG), loss=loss)
    price = price_job(JOB, cluster, source=source)
    assert any("no cost is known of plait_test.mystery" in note for note in price.notes)
    assert price.parts.memory_s > price_job(JOB, cluster).parts.memory_s


def test_experts_of_transformers_are_priced_by_balanced_routing(cluster):
    """As our own Mixtral of the same sizes, whose experts' products are the same arithmetic."""
    transformers = pytest.importorskip("transformers")
    from plait.dryrun.model_source import hugging_face_source

    config = transformers.MixtralConfig(
        **SIZES_FOR_TRANSFORMERS, num_local_experts=8, num_experts_per_tok=2, sliding_window=None
    )
    source = hugging_face_source(config)
    assert (source.num_experts, source.expert_rows) == (8, 2)
    experts = ExpertSettings(num_experts=8, experts_per_token=2, intermediate_size=1024)
    own = price_job(replace(JOB, model=replace(CONFIG, family="mixtral", experts=experts)), cluster)
    theirs = price_job(replace(JOB, model=None), cluster, source=source)
    masked = 6 * 8 * 512 * (1024 - 1)  # it gives attention a mask: kernels see every pair
    assert theirs.flops_per_token == pytest.approx(own.flops_per_token + masked, rel=0.02)
    spread = price_job(
        replace(JOB, model=None, plan=ParallelPlan(fsdp=8, ep=4)), cluster, source=source
    )
    states = "optimizer state"
    assert (
        spread.fullest.ledger.bytes_by_kind[states] == theirs.fullest.ledger.bytes_by_kind[states]
    )


class UsersLayer(torch.nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.norm = torch.nn.LayerNorm(128)
        self.up = torch.nn.Linear(128, hidden)
        self.down = torch.nn.Linear(hidden, 128)

    def forward(self, x_BTD):
        return x_BTD + self.down(torch.nn.functional.gelu(self.up(self.norm(x_BTD))))


class UsersModel(torch.nn.Module):
    """A model that Plait has never seen: wide layers and narrow ones between two tables."""

    def __init__(self, wide):
        super().__init__()
        self.table = torch.nn.Embedding(1000, 128)
        self.stack = torch.nn.ModuleList(UsersLayer(512 if i in wide else 256) for i in range(6))
        self.head = torch.nn.Linear(128, 1000, bias=False)

    def forward(self, tokens_BT):
        x_BTD = self.table(tokens_BT)
        for layer in self.stack:
            x_BTD = layer(x_BTD)
        return self.head(x_BTD)


def users_loss(model, tokens_BT):
    logits_BTV = model(tokens_BT)
    return torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten())


def users_source(wide, **changes):
    settings = {"loss": users_loss, "hidden_size": 128, "vocab_size": 1000} | changes
    return module_source(UsersModel(wide), **settings)


def test_a_users_own_model_is_priced_for_a_cluster(cluster):
    """Arithmetic by hand: six for each weight of a product and token."""
    job = replace(JOB, model=None, plan=ParallelPlan(fsdp=8))
    price = price_job(job, cluster, source=users_source(wide=()))
    assert price.flops_per_token == pytest.approx(6 * (6 * 2 * 128 * 256 + 128 * 1000))
    mixed = price_job(job, cluster, source=users_source(wide=(1, 3)))
    wanted = 6 * (4 * 2 * 128 * 256 + 2 * 2 * 128 * 512 + 128 * 1000)
    assert mixed.flops_per_token == pytest.approx(wanted)


def test_layers_of_a_users_model_are_of_one_kind_if_they_look_alike():
    assert users_source(wide=()).kinds == ("layer",) * 6
    assert users_source(wide=(1, 3)).kinds == tuple(
        f"kind {2 if i in (1, 3) else 1}" for i in range(6)
    )
    made = users_source(wide=(1, 3)).make((0, 1), 1000)
    assert [layer.up.out_features for layer in made.stack] == [256, 512]
    assert all(parameter.device.type == "meta" for parameter in made.parameters())


def test_a_users_model_says_what_cannot_be_priced(cluster):
    with pytest.raises(PlanError, match="longest ModuleList"):
        module_source(torch.nn.Linear(2, 2), loss=users_loss, hidden_size=2, vocab_size=2)
    with pytest.raises(PlanError, match="share_head=False"):
        users_source(wide=()).make((0,), 500)
