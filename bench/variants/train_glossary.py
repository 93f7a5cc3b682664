"""Fine-tune SmolLM2-135M-Instruct on the glossary task with LoRA, and write the adapter and its held-out examples.

    python bench/variants/train_glossary.py --wordnet /usr/share/wordnet --out droidspeak_ops/demo/glossary

``/usr/share/wordnet`` comes with Debian's package ``wordnet-base``. About half an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

import torch
from glossary import ask, context_text, draw_entries, draw_example, read_definitions
from peft import LoraConfig, get_peft_model
from rich.progress import track
from safetensors.torch import load_file, save_file

from droidspeak_ops.hf.pretrained import SMOLLM2, load_pretrained

QUESTIONS_PER_CONTEXT = 8
TEST_ENTRIES = 68  # about 1,000 tokens


def draw_sequence(tokenizer, definitions, rng: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """One context followed by several question turns: token ids, and labels that are -100 outside the answers."""
    entries = draw_entries(definitions, rng.randint(12, 40), rng)
    ids = tokenizer(context_text(entries)).input_ids
    labels = [-100] * len(ids)
    for entry in rng.sample(entries, QUESTIONS_PER_CONTEXT):
        suffix, answer = ask(entry, reverse=rng.random() < 0.5)
        asked, answered = tokenizer(suffix).input_ids, tokenizer(answer + "<|im_end|>").input_ids
        newline = tokenizer("\n").input_ids
        ids += asked + answered + newline
        labels += [-100] * len(asked) + answered + [-100] * len(newline)
    return torch.tensor([ids]), torch.tensor([labels])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder with data.noun")
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter and examples.json")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--sequences-per-step", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--test-examples", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    base, tokenizer = load_pretrained(SMOLLM2)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora).train()
    model.peft_config["default"].base_model_name_or_path = SMOLLM2
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup))
    )

    definitions = read_definitions(args.wordnet, "train")
    for step in track(range(args.steps), description="Fine-tuning"):
        total = 0.0
        for _ in range(args.sequences_per_step):
            input_ids, labels = draw_sequence(tokenizer, definitions, rng)
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss / args.sequences_per_step
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {total:.4f}", flush=True)

    model.save_pretrained(args.out, save_embedding_layers=False)
    # Half precision halves what is shipped; the change to the merged weights is far below their own rounding to 4 bits.
    file = args.out / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    (args.out / "README.md").unlink(missing_ok=True)
    test_definitions, test_rng = read_definitions(args.wordnet, "test"), random.Random(args.seed + 1)
    examples = [draw_example(test_definitions, TEST_ENTRIES, test_rng) for _ in range(args.test_examples)]
    text = json.dumps([dataclasses.asdict(example) for example in examples], indent=1)
    (args.out / "examples.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
