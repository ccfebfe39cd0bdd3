"""`deltaworks compare`: several methods on the same work, with repeats, intervals and pictures."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from ..study.spec import Study
from ..training.recipe import Recipe
from . import options

# Given by the study's file only: what a line of options cannot say well.
WRITTEN = ("axes", "expected", "found", "keys")
LISTED = ("methods", "baselines", "rate_axes")
# Demonstration, when neither base nor data nor a study is given.
DEMONSTRATION = {"methods": ["lora", "ia3", "bitfit"], "steps": 40, "limit": 400, "max_length": 128, "samples": 0}


def command(**given: Any) -> None:
    """Compare methods on the same base, data and budget; what was run before is not run again.

    Examples: [dim]deltaworks compare --base ./llama --data chats.jsonl --methods lora,dora,ia3 --steps 200[/] ·
    [dim]deltaworks compare --methods lowrank --budget params=100k --seeds 5 --jobs 4[/] ·
    [dim]deltaworks compare studies/nursery.yaml --output runs/nursery[/]
    """
    from ..study import needs

    needs("compare", "matplotlib", "plotly")
    from ..study.compare import compare
    from ..study.engine import Runner
    from ..study.pages import save
    from ..study.spec import Study
    from ..study.summary import summarise

    as_json, path, output = given.pop("as_json"), given.pop("study"), given.pop("output")
    jobs, ray, cache = given.pop("jobs"), given.pop("ray"), given.pop("cache")
    keys = options.given(given)
    for name in LISTED:
        if name in keys:
            keys[name] = options.listed(keys[name])
            keys[name] = [] if keys[name] == ["none"] else keys[name]
    for name in ("seeds", "rates"):
        if name in keys:
            keys[name] = _numbers(name, keys[name])
    if path is None and not {"base", "data", "steps", "epochs"} & set(keys):
        keys = DEMONSTRATION | keys
    study = Study.read(path, **keys) if path is not None else Study.of(keys)
    folder = Path(output) if output else Path("runs") / (path.stem if path is not None else "compare")
    if as_json:
        with Runner(cache, jobs, ray) as runner:
            found = compare(study, runner)
        save(found, folder)
        print(json.dumps({"output": str(folder), "run": found.run, "cached": found.cached, **summarise(found)}))
        return
    from .comparing import Progress

    with Progress() as progress, Runner(cache, jobs, ray) as runner:
        found = compare(study, runner, tell=progress.hear)
    report = save(found, folder)
    progress.close(found, report)


def _numbers(name: str, text: str) -> Any:
    """`3`, or `1e-3,1e-2` as a list.

    Raises:
        ValueError: for what is no number.
    """
    try:
        if "," in text:
            return [(int if name == "seeds" else float)(one) for one in text.split(",") if one.strip()]
        return int(text) if name == "seeds" or text.isdigit() else [float(text)]
    except ValueError:
        raise ValueError(f"--{name} {text} is not understood; write a number, or several with commas") from None


command.__signature__ = inspect.Signature([  # type: ignore[attr-defined]
    options.file("study", "A study's YAML file."),
    *options.declared(Study, WRITTEN, {
        **dict.fromkeys(LISTED, (options.SEVERAL, "A,B,...")), **dict.fromkeys(("seeds", "rates"), (str | None, None)),
    }),
    *options.declared(Recipe, options.NOT_FOR_ALL),
    *options.running("folder of the results [default: runs/STUDY]"),
])  # fmt: skip
