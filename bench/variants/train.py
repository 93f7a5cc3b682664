"""Fine-tune SmolLM2-135M-Instruct: the variants that maps and plans are measured on.

    python -m bench.variants.train glossary --wordnet /usr/share/wordnet --out droidspeak_ops/demo/glossary
    python -m bench.variants.train code docs

`glossary` is a LoRA adapter, small enough to ship; ``/usr/share/wordnet`` comes with Debian's package ``wordnet-base``.
`code` and `docs` are full fine-tunes on the source of the Python that runs this, kept in the user's cache folder, half a
gigabyte each. About half an hour each on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file

from bench.common import Row, parser
from bench.variants import glossary, stdlib
from droidspeak_ops.hf.pretrained import SMOLLM2, cache_folder, load_pretrained

Turn = tuple[str, str]
"""A question as a chat turn, and the answer."""
Text = tuple[str, Iterable[Turn]]
"""A context, and turns after it; a context without turns is text to model."""
GLOSSARY_ENTRIES = 68  # about 1,000 tokens


@dataclass(frozen=True)
class Recipe:
    """The training of a variant.

    Args:
        draw: makes a text to learn from, given the command line and a generator.
        rank: of a LoRA adapter; None to train all weights.
    """

    draw: Callable[[argparse.Namespace, random.Random], Text]
    steps: int
    texts_per_step: int
    lr: float
    rank: int | None = None


def draw_glossary(args: argparse.Namespace, rng: random.Random) -> Text:
    """Draw a glossary, and questions about it."""
    definitions = glossary.read_definitions(args.wordnet, "train")
    entries = glossary.draw_entries(definitions, rng.randint(12, 40), rng)
    asked = (glossary.ask(entry, reverse=rng.random() < 0.5) for entry in rng.sample(entries, 8))
    return glossary.context_text(entries), asked


def draw_code(args: argparse.Namespace, rng: random.Random) -> Text:
    """Draw a stretch of code."""
    return stdlib.draw_code("train", 1600, rng), ()


def draw_docs(args: argparse.Namespace, rng: random.Random) -> Text:
    """Draw a list of functions, and questions what they do."""
    functions = stdlib.draw_functions("train", rng.randint(1000, 2800), rng)
    return stdlib.docs_context(functions), map(stdlib.docs_ask, rng.sample(functions, min(6, len(functions))))


RECIPES = {
    "glossary": Recipe(draw_glossary, steps=150, texts_per_step=2, lr=1e-3, rank=16),
    "code": Recipe(draw_code, steps=100, texts_per_step=2, lr=1e-4),
    "docs": Recipe(draw_docs, steps=120, texts_per_step=1, lr=2e-4),
}


def encode(tokenizer: Any, context: str, turns: Iterable[Turn]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids ``[1, N]``, and which of them are to be learnt: those of the answers, or all if there are none."""
    ids = tokenizer(context).input_ids
    learnt = [False] * len(ids)
    for question, answer in turns:
        asked, answered = tokenizer(question).input_ids, tokenizer(answer + "<|im_end|>").input_ids
        newline = tokenizer("\n").input_ids
        ids += asked + answered + newline
        learnt += [False] * len(asked) + [True] * len(answered) + [False] * len(newline)
    return torch.tensor([ids]), torch.tensor([learnt if any(learnt) else [True] * len(ids)])


def loss_of(model: Any, ids: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of the learnt tokens; logits are made for those alone."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = causal.model(input_ids=ids, use_cache=False).last_hidden_state
    return F.cross_entropy(causal.lm_head(states[:, :-1][learnt[:, 1:]]), ids[:, 1:][learnt[:, 1:]])


def fine_tune(name: str, args: argparse.Namespace, out: Path) -> list[Row]:
    """Train a variant, write it to a folder, and return the loss of every tenth step."""
    recipe = RECIPES[name]
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    model, tokenizer = load_pretrained(SMOLLM2)
    model.to(args.device).train()
    if recipe.rank is not None:
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        lora = LoraConfig(r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=modules, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        model.peft_config["default"].base_model_name_or_path = SMOLLM2
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.lr, weight_decay=0.0, fused=True)
    steps, warmup = recipe.steps, max(1, recipe.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    rows: list[Row] = []
    for step in track(range(steps), description=f"Fine-tuning {name}"):
        total = 0.0
        for _ in range(recipe.texts_per_step):
            ids, learnt = (each.to(args.device) for each in encode(tokenizer, *recipe.draw(args, rng)))
            loss = loss_of(model, ids, learnt) / recipe.texts_per_step
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"{name}, step {step}: loss {total:.4f}", flush=True)
            rows.append({"variant": name, "step": step, "loss": total})

    if recipe.rank is None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        return rows
    model.save_pretrained(out, save_embedding_layers=False)
    # Half precision halves what is shipped; the change to the merged weights is far below their own rounding to 4 bits.
    file = out / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    (out / "README.md").unlink(missing_ok=True)
    return rows


def write_glossary_examples(args: argparse.Namespace, out: Path) -> None:
    """Write what is shipped beside the adapter: held-out examples, and others to fit maps on and choose plans by."""
    for split, source, contexts, questions in (("test", "test", 64, 1), ("calibration", "train", 16, 8)):
        definitions, rng = glossary.read_definitions(args.wordnet, source), random.Random(args.seed + 1)
        drawn = (glossary.draw_examples(definitions, GLOSSARY_ENTRIES, questions, rng) for _ in range(contexts))
        text = json.dumps([dataclasses.asdict(example) for examples in drawn for example in examples], indent=1)
        (out / f"{split}.json").write_text(text + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run the command; the rows are the losses while it trains."""
    options = parser("variants.train", __doc__)
    options.add_argument("variants", nargs="+", choices=RECIPES)
    options.add_argument(
        "--out", type=Path, help="folder to write to (default: one by name in the user's cache folder)"
    )
    options.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun")
    options.add_argument("--device", type=torch.device, default="cpu")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args(argv)
    if args.out and len(args.variants) > 1:
        options.error(f"--out: expected one variant with it, got {len(args.variants)}")
    rows: list[Row] = []
    for name in args.variants:
        out = args.out or cache_folder() / "variants" / name
        rows += fine_tune(name, args, out)
        if name == "glossary":
            write_glossary_examples(args, out)
    return rows


if __name__ == "__main__":
    main()
