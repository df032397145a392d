"""Every parser of what may come from anyone: a few dozen damaged inputs each, of thousands of `benchmarks.trust.fuzz`.

Here in this process, which is watched alike; and in workers, of parsers that do what none may.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import pytest
from fuzzing.campaign import damaged, problem_of
from fuzzing.hostility import Watch, attempt, limits, write_tree
from fuzzing.targets import TARGETS

ROOT = Path(__file__).parents[2]
QUICK = {
    "states": 60,
    "sharded": 40,
    "tokens": 40,
    "streams": 60,
    "presets": 25,
    "images": 60,
    "shards": 40,
    "runs": 30,
}

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured as Linux does")


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    return Watch(writable=str(tmp_path_factory.getbasetemp()))


@pytest.mark.parametrize("name", QUICK)
def test_damaged_inputs_load_or_are_refused_in_a_line(tmp_path, monkeypatch, capsys, watch, name):
    if name == "streams" and not importlib.util.find_spec("constriction"):
        pytest.skip("needs the coder")
    target = TARGETS[name]
    (tmp_path / "work").mkdir()
    (tmp_path / "good").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    good = target.good(tmp_path / "good")
    problems, kinds = [], Counter()
    with limits(8 << 30), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for base, tree in sorted(good.items())[:3]:
            write_tree(tree, tmp_path / "folder", tmp_path)
            outcome, _ = attempt(target.use, tmp_path / "folder", watch, target.errors, lines=target.lines)
            assert (outcome.kind, outcome.problem) == ("loads", ""), (base, outcome)
        for number in range(QUICK[name]):
            case = damaged(target, number, good, seed=7)
            write_tree(case.tree, tmp_path / "folder", tmp_path)
            outcome, _ = attempt(target.use, tmp_path / "folder", watch, target.errors, lines=target.lines)
            kinds[outcome.kind] += 1
            if problem := problem_of(case, outcome):
                problems.append(f"case {number} ({case.base}: {'; '.join(case.ways)}): {problem}")
    assert not problems, "\n".join(problems)
    assert len(kinds) > (name != "images"), kinds  # neither is everything refused, nor nothing
    capsys.readouterr()


PLANTED = """
    import os, signal, subprocess, sys, time, json
    from pathlib import Path
    from fuzzing import campaign as fuzzing
    from fuzzing.campaign import Campaign, Target
    from fuzzing.mutations import damage_bytes
    from tokenizer.files.errors import PipelineLoadError

    fuzzing.BATCH = 4

    def runs_code(folder):
        code = compile("3", str(folder / "a.py"), "exec")
        exec(code)

    bugs = {
        "dies": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
        "raises": lambda folder: {}["a"],
        "writes": lambda folder: open(sys.argv[1] + "-outside", "w").close(),
        "removes": lambda folder: os.unlink("/nowhere/at-all") if os.path.exists("/nowhere") else os.rmdir("/nowhere"),
        "calls": lambda folder: subprocess.run(["true"]),
        "executes": runs_code,
        "takes": lambda folder: bytearray(b"x") * (700 << 20),
        "hangs": lambda folder: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM}) and None or time.sleep(99),
        "refuses": lambda folder: (_ for _ in ()).throw(PipelineLoadError("a")),
    }
    found = {}
    for name, use in bugs.items():
        target = Target(name, lambda folder: {"x": {"a": b"abc"}}, use, (damage_bytes,))
        fuzzing.HANGS = 0.7 if name == "hangs" else 60.0
        rows = Campaign(target, Path(sys.argv[1]) / name, kept=Path(sys.argv[1]) / "kept").run(range(2))
        found[name] = [len(rows), sorted({row["problem"] for row in rows} - {""})]
    print(json.dumps([found, sorted(path.name for path in (Path(sys.argv[1]) / "kept").iterdir())]))
"""


def test_what_no_parser_may_do_is_seen_and_the_rest_goes_on(tmp_path):
    """A worker that dies or hangs costs its case alone; the input is kept."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", textwrap.dedent(PLANTED), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stderr
    found, kept = json.loads(result.stdout.splitlines()[-1])
    expected = {
        "dies": "ended with -9",
        "raises": "KeyError",
        "writes": f"open {tmp_path}-outside",
        "removes": "os.rmdir /nowhere",
        "calls": "subprocess.Popen",
        "executes": "exec ",
        "takes": "700 MiB",
        "hangs": "hangs",
    }
    assert all(count == 2 for count, _ in found.values()), found
    for name, problem in expected.items():
        assert len(found[name][1]) >= 1 and all(problem in text for text in found[name][1]), (name, found[name])
        assert any(folder.startswith(f"{name}-0-") for folder in kept), kept
    assert found["refuses"] == [2, []]


def test_a_case_is_the_same_wherever_it_is_made(tmp_path):
    good = {"a": {"a.json": b'{"a": 1}', "b.json": b'{"b": {"c": [1, 2]}}'}}
    for number in range(50):
        one, two = (damaged(TARGETS["runs"], number, good) for _ in range(2))
        assert one == two and one.ways
    assert damaged(TARGETS["runs"], 1, good) != damaged(TARGETS["runs"], 1, good, seed=1)


def test_what_leads_is_every_module_of_a_parser():
    """Coverage of the face of a folder, which imports nothing, would lead nowhere."""
    code = "import benchmarks.trust.fuzz_guided as f\n"
    code += "print(*sum(map(f.parsers_of, f.TARGETS), []))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [
        "pipelines.compression.streams",
        "pipelines.config.yaml_text",
        "tokenizer.files.json_text",
        "yaml.parser",
    ]
    assert set(expected) <= set(done.stdout.split())
