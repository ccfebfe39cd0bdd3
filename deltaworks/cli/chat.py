"""`deltaworks chat`: talk to a base with adapters, switching between them."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Annotated, Any

import typer

HELP = """/adapter NAME   let one adapter answer (base: none of them); /adapter alone lists them
/reset          forget the conversation
/help           this
/quit           leave (or end of file)"""


def command(
    adapter: Annotated[list[Path] | None, typer.Argument(help="Adapters' folders; named after their folders.")] = None,
    base: Annotated[str | None, typer.Option(help="The base; the first adapter's own, if not given.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 for the likeliest token each time.")] = 0.7,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    quantize: Annotated[str | None, typer.Option(help="int8, int4 or nf4.")] = None,
) -> None:
    """Chat in the terminal; answers stream; a slash command switches adapters.

    Example: [dim]deltaworks chat runs/a/adapter runs/b/adapter[/]
    """
    from .. import adapters
    from ..core.attach import activate
    from .opening import open_base

    folders = adapter or []
    if base is None:
        base = (adapters.inspect(folders[0])["base"] or {}).get("name") if folders else None
        if not base:
            raise ValueError("give a base with --base, or an adapter that names its own")
    model, tokenizer = open_base(base, "causal-lm", dtype, quantize)
    if tokenizer is None:
        raise ValueError(f"{base} has no tokenizer, so it cannot be talked to")
    names = []
    for folder in folders:
        name = _name(folder, names)
        adapters.load(model, folder, name=name)
        names.append(name)
    if names:
        activate(model, names[0])
    current, turns = (names[0] if names else "base"), []
    print(f"{base}, adapters: {', '.join(names) or 'none'}; /help for commands")
    while True:
        try:
            line = input(f"[{current}] > ").strip()
        except EOFError:
            print()
            return
        if not line:
            continue
        if line == "/quit":
            return
        if line == "/help":
            print(HELP)
        elif line == "/reset":
            turns = []
        elif line.startswith("/adapter"):
            wanted = line.removeprefix("/adapter").strip()
            if wanted in (*names, "base"):
                if names:
                    activate(model, None if wanted == "base" else wanted)
                current = wanted
            else:
                print(f"there are: {', '.join((*names, 'base'))}")
        elif line.startswith("/"):
            print(f"{line.split()[0]} is no command\n{HELP}")
        else:
            turns.append({"role": "user", "content": line})
            answer = _answer(model, tokenizer, turns, max_new_tokens, temperature)
            turns.append({"role": "assistant", "content": answer})


def _name(folder: Path, taken: list[str]) -> str:
    import re

    named = folder.resolve()
    plain = named.parent.name if named.name == "adapter" else named.name
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", plain).strip("-") or "adapter"
    name = name if name[0].isalpha() else f"a-{name}"
    number, unique = 2, name
    while unique in (*taken, "base"):
        unique, number = f"{name}-{number}", number + 1
    return unique


def _answer(model: Any, tokenizer: Any, turns: list[dict[str, str]], length: int, temperature: float) -> str:
    """Generate and print an answer piece by piece; a base without chat template continues the last line."""
    import torch
    from transformers import TextIteratorStreamer

    if tokenizer.chat_template:
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(turns[-1]["content"], return_tensors="pt")
    inputs = {k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    failure: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():
                model.generate(
                    **inputs, max_new_tokens=length, streamer=streamer, pad_token_id=tokenizer.pad_token_id, **sampling
                )
        except BaseException as error:  # handed to the main thread, which is waiting for the streamer
            failure.append(error)
            streamer.end()

    thread = Thread(target=run, daemon=True)
    thread.start()
    pieces = []
    for piece in streamer:
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    thread.join()
    if failure:
        raise failure[0]
    return "".join(pieces)
