"""Running a program that a model wrote, apart and with little to do harm with.

The prompt is a function's header and documentation string with tests in it, as `doctest` reads them; what the model
wrote is its body. Three walls stand around it: only a part of the language is allowed, without imports, dunder names
and built-in functions that reach outside; it runs in an interpreter of its own, without the site's packages, in an
empty folder, with bounds of time, memory, files and processes; and there an audit hook ends it when it opens a file, a
socket or a process all the same. That is enough for what a model writes by mistake. It is no wall against a program
that was written to break out: run those in a container or a virtual machine.
"""

from __future__ import annotations

import ast
import doctest
import subprocess
import sys
import tempfile

SECONDS, MEMORY = 2, 512 << 20
BUILTINS = """
    abs all any ascii bin bool bytes chr complex dict divmod enumerate filter float format frozenset hash hex int
    isinstance issubclass iter len list map max min next oct ord pow print range repr reversed round set slice sorted
    str sum tuple zip
    ArithmeticError AssertionError AttributeError Exception IndexError KeyError LookupError NotImplementedError
    OverflowError StopIteration TypeError ValueError ZeroDivisionError
""".split()  # noqa: SIM905

# Bounds and hook stay: a process cannot raise the one again nor take the other away.
_RUNNER = """
import builtins, io, sys
try:
    import resource
except ImportError:
    resource = None
if resource is not None:
    for kind, bound in (("CPU", {seconds}), ("AS", {memory}), ("FSIZE", 0), ("NPROC", 0), ("NOFILE", 16), ("CORE", 0)):
        if hasattr(resource, "RLIMIT_" + kind):
            try:
                resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (bound, bound))
            except (ValueError, OSError):
                pass
source = sys.stdin.read()
allowed = {{name: getattr(builtins, name) for name in {builtins!r}}}
program = compile(source, "<program>", "exec")
refused = ("open", "socket.", "subprocess.", "os.", "shutil.", "ctypes.", "import", "mmap.", "winreg.", "pty.")
watching = False

def watch(event, arguments):
    if watching and event.startswith(refused):
        raise PermissionError(event)

sys.addaudithook(watch)
scope = {{"__builtins__": allowed, "__name__": "program"}}
out, sys.stdout = sys.stdout, io.StringIO()
passed = True
watching = True
exec(program, scope)
for example in {examples!r}:
    sys.stdout = io.StringIO()
    try:
        value = eval(compile(example[0], "<test>", "eval"), scope)
        passed = passed and sys.stdout.getvalue() + ("" if value is None else repr(value) + "\\n") == example[1]
    except Exception:
        passed = False
watching = False
sys.stdout = out
print("passed" if passed else "failed")
"""


def passes(prompt: str, generated: str, seconds: float = SECONDS) -> float | None:
    """1 when the tests in a prompt hold for the function that it and what follows it are, 0 when not.

    What follows is read up to the first line that is not indented, where a function ends and a model may go on.
    None when the prompt has no tests that are expressions.
    """
    tests = _tests(prompt)
    if not tests or not all(_is_expression(test) for test, _ in tests):
        return None
    source = prompt + body(generated)
    if not allowed(source):
        return 0.0
    runner = _RUNNER.format(seconds=max(1, int(seconds)), memory=MEMORY, builtins=BUILTINS, examples=tests)
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", "-c", runner], input=source, capture_output=True, text=True,
                timeout=seconds + 3, cwd=folder, env={},
            )  # fmt: skip
        except (subprocess.TimeoutExpired, UnicodeError):
            return 0.0
    return float(done.returncode == 0 and done.stdout.strip() == "passed")


def body(generated: str) -> str:
    """What was generated, up to the first line that is not indented."""
    lines = generated.split("\n")
    end = next((number for number, line in enumerate(lines) if line.strip() and not line.startswith((" ", "\t"))), None)
    return "\n".join(lines[:end]) + "\n"


def allowed(source: str) -> bool:
    """Whether a source is Python that parses and uses nothing but the part of the language that is allowed."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal):
            return False
        # Attributes that begin with an underscore, and these of frames and generators, lead to the whole interpreter.
        if isinstance(node, ast.Attribute) and node.attr.startswith(("_", "gi_", "cr_", "ag_", "f_", "tb_", "format")):
            return False
        if isinstance(node, ast.Name) and node.id.startswith("__"):
            return False
    return True


def _tests(prompt: str) -> list[tuple[str, str]]:
    """Expressions and what they must give, as the documentation string at a prompt's end has them."""
    try:
        tree = ast.parse(prompt + "    pass\n")
        node = tree.body[-1]
        text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
        return [(one.source.strip(), one.want) for one in doctest.DocTestParser().get_examples(text or "")]
    except (SyntaxError, ValueError, IndexError):
        return []


def _is_expression(test: str) -> bool:
    try:
        ast.parse(test, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return allowed(test)
