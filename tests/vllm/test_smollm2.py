"""A real pair inside vLLM: SmolLM2-135M-Instruct as sender, its shipped fine-tune as receiver, and the demo's texts."""

from collections.abc import Callable

import pytest
from support.engine import BLOCK_SIZE, Engine
from support.serving import Pair, asking, prompt

import droidspeak_ops as ds
from droidspeak_ops.demo.measure import glossary_examples
from droidspeak_ops.demo.run import load_glossary_variant
from droidspeak_ops.hf.pretrained import load_pretrained

pytest.importorskip("vllm.config")

PLANS = {
    "reused": ds.Plan(),
    "band": ds.Plan(bands=[(10, 20)]),
    "bands": ds.Plan(bands=[(0, 4), (15, 18)], project=[9]),
    "projected": ds.Plan(project="rest"),
    "selected": ds.Plan(select=48),
    "recent": ds.Plan(project="rest", select=0.1, selector="recent"),
    "all": ds.Plan(bands=[(0, 30)]),
}
CONTEXT, TOKENS = 22 * BLOCK_SIZE, 16


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("smollm2")
    for role, (model, tokenizer) in (("sender", load_pretrained("smollm2")), ("receiver", load_glossary_variant())):
        for each in (model, tokenizer):
            each.save_pretrained(folder / role)
    return Pair(str(folder / "sender"), str(folder / "receiver"), folder)


def test_greedy_tokens_are_those_of_transformers(smollm2: Pair, start: Callable[..., Engine]) -> None:
    """For every plan, and for none; contexts and bands are of several chunks."""
    example = glossary_examples("test")[0].encode(smollm2.tokenizer)
    ids, suffix = example.context[:, :CONTEXT], example.suffix
    captured = smollm2.captured(ids)
    smollm2.store.save(captured)
    engine = start(
        smollm2.receiver_folder, smollm2.settings("kv_consumer"), max_model_len=1024, max_num_batched_tokens=256
    )
    wishes = [*map(asking, PLANS.values()), None]
    found = engine.generate([(prompt(ids, suffix), wish) for wish in wishes], count=TOKENS)
    answers = {name: smollm2.generated(captured, suffix, plan, count=TOKENS) for name, plan in PLANS.items()}
    for (name, answer), each in zip(answers.items(), found, strict=False):
        assert each.said == {"context_tokens": CONTEXT, "sender": "base", "plan": str(PLANS[name]), "loaded": True}
        assert each.tokens[: len(answer)] == answer, name  # engines of these tests go on behind an answer's end
    own = smollm2.expected(ids, suffix, None, count=TOKENS)
    assert found[-1].tokens[: len(own)] == own == answers["all"] != answers["reused"]
