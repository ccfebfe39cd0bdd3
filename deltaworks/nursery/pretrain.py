"""Pre-train the decoder that ships with the package: `python -m deltaworks.nursery.pretrain OUTPUT`.

Writes a folder that `AutoModelForCausalLM` and `AutoTokenizer` load: bf16 weights, config, tokenizer and a model card.
Two CPU cores with bf16 matrix instructions need about 40 minutes for the default number of steps.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from deltaworks.nursery import corpus, tokenizer
from deltaworks.nursery.pretraining import Optimizers, bits_per_byte, windows


def architecture() -> LlamaConfig:
    """Llama with 5.2 million parameters."""
    return LlamaConfig(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=tokenizer.CONTEXT,
        tie_word_embeddings=True,
        **tokenizer.IN_CONFIG,
    )


def write_sample(model: Any, entries: PreTrainedTokenizerFast, seed: int) -> str:
    """What the base goes on to write after the first line of a class: one sample, the first, not the best."""
    torch.manual_seed(seed)
    prompt = entries('class Stack:\n    """A last-in, first-out stack."""\n\n    def', return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=200, do_sample=True, temperature=0.7, top_p=0.9)
    return str(entries.decode(written[0], skip_special_tokens=True))


def card(facts: dict[str, Any], sample: str) -> str:
    """The model card, from the run's own numbers."""
    runs = facts["runs"]
    return f"""---
license: psf-2.0
language: [en]
library_name: transformers
pipeline_tag: text-generation
tags: [code, python]
---
# nursery:decoder

A Llama of {facts["parameters"] / 1e6:.2f} million parameters (6 layers, width 256, 4 heads on 2 key-value heads, tied
embeddings, 512 positions) that has read the Python standard library. It is the base on which Deltaworks' demo, tests
and comparisons train. It writes Python that looks right and often parses; what it writes means little, it repeats
itself, and it is no assistant.

| | |
|---|---|
| data | source and documentation strings of Python {facts["python"]}'s standard library and the language reference of \
`help()`, without tests and character tables: {facts["documents"]} documents, {facts["bytes"] / 1e6:.1f} MB, \
{facts["tokens"] / 1e6:.2f} million tokens |
| tokenizer | byte-level BPE with 4096 entries, learnt from the same text; chat roles are in it, untrained |
| training | {" + ".join(str(run["steps"]) for run in runs)} steps of {runs[-1]["batch"]} windows of 512 tokens \
(each run from the last one's weights), \
{facts["tokens_seen"] / 1e6:.1f} million tokens seen, {facts["tokens_seen"] / facts["tokens"]:.1f} passes; Muon and \
AdamW, peak rate {runs[-1]["rate"]}, {sum(run["minutes"] for run in runs):.0f} minutes on at most two CPU cores |
| held out | **{facts["held_out_bits_per_byte"]:.3f} bits per byte** on {facts["held_out_documents"]} documents \
({facts["held_out_bytes"] / 1e6:.2f} MB) of modules that are not in the training text (`email`, `logging`, `inspect`, \
...), measured on the stored bf16 weights in windows of 512 tokens that do not overlap |

Made by `python -m deltaworks.nursery.pretrain`. The first sample at temperature 0.7, top-p 0.9:

```python
{sample}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="end earlier, with the schedule compressed")
    parser.add_argument("--batch", type=int, default=8, help="windows of 512 tokens in a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decay", type=float, default=0.6, help="share of the run in which the rate falls to zero")
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--start", type=Path, help="a checkpoint of an earlier run whose weights to go on from")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    documents = corpus.documents("train")
    entries = tokenizer.framed(tokenizer.train(document.text for document in documents), "causal")
    model = LlamaForCausalLM(architecture())
    earlier: list[dict[str, Any]] = []
    if options.start:
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        earlier = json.loads((options.start / "runs.json").read_text())
    model.train()
    embeddings = model.model.embed_tokens

    def numbers(document: corpus.Document) -> list[int]:
        return [*entries.backend_tokenizer.encode(document.text).ids, tokenizer.EOS_ID]

    texts = [numbers(document) for document in documents]

    def loss(tokens: Tensor) -> Tensor:
        hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        logits = functional.linear(hidden, embeddings.weight).float()
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def runs() -> list[dict[str, Any]]:
        this = {"steps": step, "batch": options.batch, "rate": options.rate, "decay": options.decay}
        return [*earlier, {**this, "seed": options.seed, "minutes": round(minutes, 1), "finished": progress >= 1}]

    def save(folder: Path) -> None:
        rounded = LlamaForCausalLM(model.config).bfloat16()
        rounded.load_state_dict(model.state_dict())
        rounded.save_pretrained(folder)
        entries.save_pretrained(folder)
        (folder / "runs.json").write_text(json.dumps(runs(), indent=2) + "\n")

    compiled = torch.compile(loss, dynamic=False)
    optimizers = Optimizers(model, options.rate, options.decay)
    order, shuffle = random.Random(options.seed), torch.Generator().manual_seed(options.seed)
    rows: list[Tensor] = []
    began, minutes, step, progress, smoothed = time.monotonic(), 0.0, 0, 0.0, None
    while progress < 1:
        if len(rows) < options.batch:
            order.shuffle(texts)
            stream = torch.tensor([token for ids in texts for token in ids])
            rows.extend(windows(stream, tokenizer.CONTEXT + 1, shuffle))
        batch = torch.stack([rows.pop() for _ in range(options.batch)])
        with torch.autocast("cpu", torch.bfloat16):
            value = compiled(batch)
        value.backward()
        optimizers.step(progress)
        step += 1
        minutes = (time.monotonic() - began) / 60
        progress = max(step / options.steps, minutes / options.minutes)
        smoothed = value.item() if smoothed is None else 0.98 * smoothed + 0.02 * value.item()
        if step % 20 == 0:
            print(f"step {step}  progress {progress:.3f}  loss {smoothed:.3f}  {minutes:.1f} min", flush=True)
        if step % options.save_every == 0:
            save(options.output / "checkpoints" / str(step))

    save(options.output)
    held_out = corpus.documents("validation")
    size = sum(len(document.text.encode()) for document in held_out)
    stored = LlamaForCausalLM.from_pretrained(options.output, dtype=torch.float32).eval()
    measured = bits_per_byte(stored, map(numbers, held_out), size)
    facts = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "python": platform.python_version(),
        "documents": len(documents),
        "bytes": sum(len(document.text.encode()) for document in documents),
        "tokens": sum(map(len, texts)),
        "tokens_seen": sum(run["steps"] * run["batch"] for run in runs()) * tokenizer.CONTEXT,
        "runs": runs(),
        "held_out_documents": len(held_out),
        "held_out_bytes": size,
        "held_out_bits_per_byte": round(measured, 4),
    }
    sample = write_sample(stored, entries, options.seed)
    (options.output / "facts.json").write_text(json.dumps(facts, indent=2) + "\n")
    (options.output / "README.md").write_text(card(facts, sample))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
