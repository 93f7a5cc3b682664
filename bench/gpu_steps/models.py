"""A whole model of a real shape with random weights: the steps `ttft`, `graph` and `trace` of ``python -m bench.gpu``.

One model is sender and receiver. Its times are real, and what it says means nothing.
"""

from __future__ import annotations

import copy
import statistics
import time
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import droidspeak_ops as ds
from bench.gpu_steps.checks import counters
from bench.gpu_steps.step import Step
from bench.gpu_steps.times import host_microseconds, median, milliseconds
from droidspeak_ops.context.context import SharedContext
from droidspeak_ops.hf.decoder import Decoder
from droidspeak_ops.hf.passes import Pass
from droidspeak_ops.prefill.schedule import resolve
from droidspeak_ops.prefill.select import budget
from droidspeak_ops.prefill.weights import Norm
from droidspeak_ops.profiling.timing import next_logits

SUFFIX_TOKENS = 32
DECODED_TOKENS = 32
SELECTED = ds.Plan(select=0.05)
RECENT = replace(SELECTED, selector="recent")
TRACED_KERNELS = 15
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
DRY_LLAMA = {
    **LLAMA,
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(step: Step, layers: int) -> Any:
    """Return a model of the shape of Llama-3.1-8B but for the number of layers."""
    torch.manual_seed(0)
    torch.set_default_dtype(step.dtype)
    try:
        with torch.device(step.device):
            config = LlamaConfig(**(DRY_LLAMA if step.dry else LLAMA), num_hidden_layers=layers)
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def captured(model: Any, tokens: int) -> tuple[SharedContext, torch.Tensor]:
    """Return a context of random tokens with all hidden states, and the prompt that goes on behind it.

    Without the digest of all weights, for which 16 GB would be copied from the GPU.
    """
    ids = torch.randint(model.config.vocab_size, (1, tokens + SUFFIX_TOKENS), device=model.device)
    with mock.patch("droidspeak_ops.hf.decoder.weights_digest", return_value="not read"):
        return ds.capture(model, ids[:, :tokens], layers=range(model.config.num_hidden_layers)), ids


def band(depth: int, length: int) -> ds.Plan:
    """Return a plan of one band, from the middle on."""
    return ds.Plan([(depth // 2, min(depth // 2 + length, depth))])


# --- ttft -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def ttft(step: Step) -> None:
    """Time plans against full prefill, the longest context first."""
    model = llama(step, 6 if step.dry else 32)
    receiver = ds.Receiver(model)
    step.add(
        "model", parameters=sum(each.numel() for each in model.parameters()), layers=model.config.num_hidden_layers
    )
    for tokens in (128, 64) if step.dry else (32768, 8192, 16384):  # of which dry selects some, and not all
        with step.guarded("plan", tokens=tokens):
            _first_tokens(step, model, receiver, tokens)
        if not step.dry:
            torch.cuda.empty_cache()


def _first_tokens(step: Step, model: Any, receiver: ds.Receiver, tokens: int) -> None:
    depth, rounds = model.config.num_hidden_layers, 3
    context, ids = captured(model, tokens)

    def full() -> None:
        model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

    def suffix_of(count: int) -> float:
        """Milliseconds of the last tokens over transformers' own cache, which moves K/V once to append, as ours does."""
        head = tokens + SUFFIX_TOKENS - count
        _, *times = (
            milliseconds(partial(next_logits, model, ids, _dynamic(model, context, head))) for _ in range(1 + rounds)
        )
        return statistics.median(times)

    def fill(plan: ds.Plan, norm: Norm = "hf", receiver: Any = receiver) -> Any:
        prompt_ids = ids if plan.select else None  # whose check waits for the GPU
        return ds.partial_prefill(receiver, context, plan, prompt_ids=prompt_ids, norm=norm)

    def first_token(plan: ds.Plan, norm: Norm = "hf") -> None:
        next_logits(model, ids, fill(plan, norm))

    full()
    suffix_ms = suffix_of(SUFFIX_TOKENS)
    # As many tokens as a plan that selects runs, though all at the end: its parts but for choosing, which is a row of its own.
    selected_ms = suffix_of(budget(SELECTED.select, tokens) + SUFFIX_TOKENS)
    layer_ms = _one_layer(model, context, rounds)
    projection_ms = {norm: _one_projection(model, context, norm, rounds) for norm in ("hf", "folded")}
    step.add(
        "parts", tokens=tokens, suffix_ms=suffix_ms, selected_and_suffix_ms=selected_ms, layer_ms=layer_ms,
        projection_hf_ms=projection_ms["hf"], projection_folded_ms=projection_ms["folded"],
    )  # fmt: skip

    plans: tuple[tuple[str, ds.Plan, Norm], ...] = (
        ("all reused", ds.Plan(), "hf"),
        ("all projected", ds.Plan(project="rest"), "hf"),
        ("all projected, folded", ds.Plan(project="rest"), "folded"),
        ("band of 5", band(depth, 5), "hf"),
        ("band of 10", band(depth, 10), "hf"),
        ("selected 5 %", SELECTED, "hf"),
        ("recent 5 %", RECENT, "hf"),
    )
    for name, plan, norm in plans:
        with step.guarded("plan", tokens=tokens, plan=name):
            first, filling = partial(first_token, plan, norm), partial(fill, plan, norm)
            first()
            held = _allocated(reset=True)
            first()
            peak = _allocated()
            pairs = [(milliseconds(full), milliseconds(first)) for _ in range(rounds)]
            full_ms, plan_ms = (statistics.median(column) for column in zip(*pairs, strict=True))
            fill_ms = median(filling, rounds)
            # Of a plan that selects this is until its call returns, which waits for the GPU where it chooses.
            host_ms, unread_ms = (
                host_microseconds(each, calls=1) / 1e3 for each in (filling, partial(filling, receiver=model))
            )
            work = resolve(plan, depth).work
            parts = selected_ms if plan.select else suffix_ms
            parts += work.run * layer_ms + work.projected * projection_ms[norm]
            step.add(
                "plan", tokens=tokens, plan=name, layers_run=work.run, full_ms=full_ms, plan_ms=plan_ms,
                speedup=statistics.median(one / other for one, other in pairs), parts_ms=parts, of_parts=plan_ms / parts,
                fill_ms=fill_ms, fill_host_ms=host_ms, fill_host_unread_ms=unread_ms, peak_gib=peak, held_gib=held,
            )  # fmt: skip
    with step.guarded("choosing", tokens=tokens):
        runs = [partial(first_token, plan) for plan in (RECENT, SELECTED)]
        pairs = [(milliseconds(runs[0]), milliseconds(runs[1])) for _ in range(3 * rounds)]
        step.add(
            "choosing", tokens=tokens, ms=statistics.median(chosen - recent for recent, chosen in pairs),
            percent_of_plan=statistics.median(100 * (chosen - recent) / chosen for recent, chosen in pairs),
        )  # fmt: skip


def _dynamic(model: Any, context: SharedContext, tokens: int) -> DynamicCache:
    """Return transformers' own cache of the first tokens of a context."""
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(*(half[:, :, :tokens] for half in context.kv(layer)[:2]), layer)
    return cache


def _one_layer(model: Any, context: SharedContext, rounds: int) -> float:
    """Return the milliseconds of a decoder layer over the context."""
    decoder = Decoder(model)
    over, middle = Pass(decoder, context.tokens.shape), decoder.num_layers // 2
    hidden = context.hidden(middle)
    return median(lambda: over.run(middle, hidden, DynamicCache(config=model.config)), rounds)


def _one_projection(model: Any, context: SharedContext, norm: str, rounds: int) -> float:
    """Return the milliseconds of a layer's K and V by the operator alone, its weights folded beforehand."""
    decoder = Decoder(model)
    over = Pass(decoder, context.tokens.shape)
    slots = torch.arange(context.tokens.shape[1], device=model.device)
    layers = []
    for layer in range(min(8, decoder.num_layers)):
        weights, (cos, sin) = decoder.weights(layer), over.rotation(layer)
        projections, folded = (weights.k_weight, weights.v_weight), norm == "folded"
        if folded:
            projections = [ds.ops.fold_norm_weight(weight, weights.norm_weight) for weight in projections]
        caches = [torch.empty_like(half) for half in context.kv(layer)[:2]]
        layers.append(ds.ops.Projection(
            context.hidden(layer), *projections, *caches, slots, norm=norm, norm_eps=weights.norm_eps,
            norm_weight=None if folded else weights.norm_weight, cos=cos, sin=sin,
        ))  # fmt: skip

    def run() -> None:
        for layer in layers:
            ds.ops.kv_project(layer)

    return median(run, rounds) / len(layers)


def _allocated(*, reset: bool = False) -> float | None:
    """Return GiB: what is held now, from where the peak then counts; or that peak."""
    if not torch.cuda.is_available():
        return None
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**30
    return torch.cuda.max_memory_allocated() / 2**30


# --- graph ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def graph(step: Step) -> None:
    """Time decoding over three caches, and partial prefill in a CUDA graph."""
    model = llama(step, 6 if step.dry else 8)
    context, ids = captured(model, 64 if step.dry else 8192)
    plans = {"all projected": ds.Plan(project="rest"), "band of 5": band(model.config.num_hidden_layers, 5)}
    with step.guarded("decode"):
        _decode(step, model, context, ids, plans["all projected"])
    for name, plan in plans.items():
        if step.dry:
            step.add("graph", plan=name, not_run="needs a GPU")
            continue
        with step.guarded("graph", plan=name):
            _in_graph(step, model, context, name, plan)


def _in_graph(step: Step, model: Any, context: SharedContext, name: str, plan: ds.Plan) -> None:
    fill = partial(ds.partial_prefill, ds.Receiver(model), context, plan)
    wanted = _rows(fill())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache = fill()
    shared = {half.data_ptr() for layer in range(len(wanted) // 2) for half in context.kv(layer)[:2]}
    for rows in _rows(cache):
        if rows.data_ptr() not in shared:
            rows.fill_(float("nan"))
    graph.replay()
    same = all(torch.equal(one, other) for one, other in zip(_rows(cache), wanted, strict=True))
    step.add("graph", plan=name, bitwise=same, eager_ms=median(fill, 5), replay_ms=median(graph.replay, 5))


def _rows(cache: Any) -> list[torch.Tensor]:
    return [half for layer in cache.layers for half in (layer.keys, layer.values)]


def _decode(step: Step, model: Any, context: SharedContext, ids: torch.Tensor, plan: ds.Plan) -> None:
    """Time a token over our cache, over transformers' and over its cache of fixed capacity, and compare the tokens."""
    tokens = context.tokens.shape[1]
    filled = ds.partial_prefill(model, context, plan)

    def dynamic() -> Any:
        cache = DynamicCache(config=model.config)
        for index, layer in enumerate(filled.layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    makers = {
        "MixedCache": lambda: copy.deepcopy(filled),
        "DynamicCache": dynamic,
        "to_static": lambda: filled.to_static(tokens + 2 * DECODED_TOKENS),
    }
    chosen: dict[str, list[int]] = {}

    def decode(cache: Any, found: list[torch.Tensor]) -> None:
        token = ids[:, tokens : tokens + 1]
        for _ in range(DECODED_TOKENS):
            token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            found.append(token)

    for name, make in makers.items():
        with step.guarded("decode", provider=name):
            decode(make(), [])
            found: list[torch.Tensor] = []
            ms = milliseconds(partial(decode, make(), found)) / DECODED_TOKENS
            chosen[name] = torch.cat(found, dim=1).flatten().tolist()
            same = chosen[name] == chosen.get("MixedCache")
            step.add("decode", provider=name, tokens=tokens, ms_per_token=ms, same_tokens=same)


# --- trace ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def trace(step: Step) -> None:
    """Profile a context that is projected and its suffix, and read the counters for the projection."""
    began = time.monotonic()
    with step.guarded("trace"):
        _traced(step)
    if not step.dry:
        torch.cuda.empty_cache()
    counters(step, step.seconds - (time.monotonic() - began) - 3)


def _traced(step: Step) -> None:
    model = llama(step, 6 if step.dry else 32)
    context, ids = captured(model, 64 if step.dry else 8192)
    receiver, tokens = ds.Receiver(model), context.tokens.shape[1]

    def first_token() -> None:
        cache = ds.partial_prefill(receiver, context, ds.Plan(project="rest"))
        model(ids[:, tokens:], past_key_values=cache, use_cache=True, logits_to_keep=1)

    median(first_token, rounds=1, warm_up=2)
    activities = [ProfilerActivity.CPU] if step.dry else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        total = milliseconds(first_token)
    time_of = "self_cpu_time_total" if step.dry else "self_device_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, time_of))
    if not step.dry:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(getattr(event, time_of) for event in events) / 1e3
    step.add("trace", tokens=tokens, ms=total, busy_ms=busy)
    for event in events[:TRACED_KERNELS]:
        step.add("kernel", kernel=event.key[:120], calls=event.count, ms=getattr(event, time_of) / 1e3)
    profiler.export_chrome_trace(str(step.folder / "trace.json.gz"))
