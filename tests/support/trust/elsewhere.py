"""The bits of a short run of each stage and of 64 samples, recorded for kinds of machines, and how another's differ.

    PYTHONPATH=.:tests/support python -m trust.elsewhere     tells those of this process, in JSON

A row of the table has the torch it was made with, the processor, what limits its instruction sets (ATen's, oneDNN's and
MKL's variables are read when a process begins) and the number of threads. Values that several rows share are kept once.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[3]
TABLE = ROOT / "tests" / "fixtures" / "elsewhere.json"
STEPS, SAMPLES, WHOLE = 50, 64, 2  # of so many samples pixels are kept as floats, of the others their sha256
LIMITS = {"ATen": "ATEN_CPU_CAPABILITY", "oneDNN": "ONEDNN_MAX_CPU_ISA", "MKL": "MKL_ENABLE_INSTRUCTIONS"}
AVX2 = {"ATen": "avx2", "oneDNN": "AVX2", "MKL": "AVX2"}
SETTINGS: list[tuple[dict[str, str], int]] = [
    ({}, 1),
    ({"ATen": "default"}, 1),
    ({"ATen": "avx2"}, 1),
    ({"oneDNN": "AVX2"}, 1),
    ({"oneDNN": "AVX512_CORE"}, 1),
    ({"MKL": "AVX2"}, 1),
    (AVX2, 1),
    ({}, 2),
    (AVX2, 2),
]
"""What is tried on a machine: one limit each, then all, which is as near as it gets to a machine without AVX-512."""

Row = dict[str, Any]


# Here


def machine() -> Row:
    """What decides how this process rounds, as far as it can be told."""
    import torch

    facts = processor()
    limits = {name: os.environ[variable] for name, variable in LIMITS.items() if os.environ.get(variable)}
    return {
        "torch": torch.__version__,
        "processor": facts["processor"],
        "flags": facts["flags"],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "libraries": {"oneDNN": torch.backends.mkldnn.is_available(), "MKL": torch.backends.mkl.is_available()},
        "limits": limits,
        "threads": torch.get_num_threads(),
    }


def processor() -> Row:
    """Its name, family and model, and which of the instruction sets it has that libraries choose kernels by."""
    told = Path("/proc/cpuinfo")
    if not told.exists():
        import platform

        return {"processor": f"{platform.machine()} {platform.processor()}", "flags": []}
    lines = [line.partition(":") for line in told.read_text().partition("\n\n")[0].splitlines()]
    facts = {name.strip(): value.strip() for name, _, value in lines}
    name = f"{facts.get('model name', platform_name())}, family {facts.get('cpu family')}, model {facts.get('model')}"
    wanted = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "avx_vnni")
    return {"processor": name, "flags": [flag for flag in wanted if flag in facts.get("flags", "").split()]}


def platform_name() -> str:
    """Where `/proc/cpuinfo` names no model, as on ARM."""
    import platform

    return platform.machine()


def bits() -> Row:
    """Of this process: figures of each step as hexadecimal floats, and what else has to be the same to the bit."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        return {"tokenizer": run_of(folder, "train_tokenizer"), "prior": run_of(folder, "train_prior"), **samples()}


def run_of(folder: Path, stage: str) -> Row:
    """Losses of each step, and sha256 of the final weights."""
    from launch import losses, make_tokens, tensors, train_stage
    from one_process import begin_anew

    begin_anew()
    tokens = make_tokens(folder / "tokens") if stage == "train_prior" else folder
    out = train_stage(stage, folder / stage, tokens, train__steps=STEPS)
    begin_anew()
    found = tensors(folder / stage)
    weights = hashlib.sha256()
    for name in sorted(found):
        weights.update(name.encode() + found[name].numpy().tobytes())
    assert out.exists() and found
    return {"losses": [value.hex() for value in losses(folder / stage)], "weights": weights.hexdigest()}


def samples() -> Row:
    """Ids, 8-bit pixels and floats of samples of the pipeline that is shipped, each with its own seed."""
    from pipelines import ImagePipeline
    from pipelines.images.pictures import convert_images

    pipe = ImagePipeline.from_pretrained("digits")
    labels = [k % 10 for k in range(SAMPLES)]
    tokens = pipe(num_images=SAMPLES, labels=labels, seed=0, output_type="latent", progress=False).tokens
    pixels = pipe.decode(tokens, output_type="pt")
    return {
        "ids": packed(tokens.numpy().astype(np.uint16)),
        "bytes": packed(np.asarray(convert_images(pixels, "np"))),
        "floats": packed(pixels[:WHOLE].numpy()),
        "all floats": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(),
    }


def packed(array: np.ndarray) -> str:
    """As text: type, shape, bytes in hexadecimal, in which chance spells no words."""
    data = zlib.compress(np.ascontiguousarray(array).tobytes(), 9).hex()
    return f"{array.dtype} {'x'.join(map(str, array.shape))} {data}"


def unpacked(text: str) -> np.ndarray:
    """See `packed`."""
    kind, shape, data = text.split(" ", 2)
    return np.frombuffer(zlib.decompress(bytes.fromhex(data)), kind).reshape([int(side) for side in shape.split("x")])


def told_by(limits: dict[str, str], threads: int) -> Row:
    """What a process with these limits tells: a row of the table, with its values."""
    clean = {name: value for name, value in os.environ.items() if name not in LIMITS.values()}
    more = {LIMITS[name]: value for name, value in limits.items()} | {"OMP_NUM_THREADS": str(threads)}
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests" / "support")))
    environment = {**clean, **more, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    environment["OMP_WAIT_POLICY"] = "passive"  # a thread that waits leaves its core to others
    done = subprocess.run([sys.executable, __file__], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"limits {limits}, {threads} thread(s): {done.stderr[-2000:]}")
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return row


# The table


def read_table(path: Path = TABLE) -> list[Row]:
    """Its rows, each with its values."""
    kept = json.loads(path.read_text())
    return [{**row, "bits": unfolded(row["bits"], kept["values"])} for row in kept["rows"]]


def unfolded(names: Any, values: dict[str, Any]) -> Any:
    """Values in place of their names."""
    return {key: unfolded(name, values) if isinstance(name, dict) else values[name] for key, name in names.items()}


def write_table(rows: list[Row], path: Path = TABLE) -> None:
    """Rows, whose values are kept once each."""
    values: dict[str, Any] = {}

    def folded(found: Row) -> Row:
        return {key: folded(each) if isinstance(each, dict) else keep(each) for key, each in found.items()}

    def keep(value: Any) -> str:
        name = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
        values[name] = value
        return name

    kept = [{**row, "bits": folded(row["bits"])} for row in rows]
    path.write_text(json.dumps({"rows": kept, "values": values}, indent=1) + "\n")


def merged(rows: list[Row], new: Iterable[Row]) -> list[Row]:
    """Rows, and new ones in place of those of the same machine and settings."""
    found = {key_of(row): row for row in rows}
    found.update({key_of(row): row for row in new})
    return list(found.values())


def key_of(row: Row) -> str:
    """All that a row is looked up by."""
    return json.dumps({name: value for name, value in row["machine"].items()}, sort_keys=True)


def name_of(row: Row) -> str:
    """In a table."""
    where, limits = row["machine"], row["machine"]["limits"]
    words = ", ".join(f"{name} {value}" for name, value in limits.items()) or "no limit"
    return f"{where['processor']}; torch {where['torch']}; {words}; {where['threads']} thread(s)"


# Differences


def differences(here: Row, there: Row) -> dict[str, str]:
    """Each part of `bits` that is not the same, and by how much."""
    found = {}
    for stage in ("tokenizer", "prior"):
        ours, theirs = here[stage], there[stage]
        if ours["losses"] != theirs["losses"]:
            found[f"losses of the {stage}"] = difference_of_losses(ours["losses"], theirs["losses"])
        if ours["weights"] != theirs["weights"]:
            found[f"weights of the {stage}"] = f"differ after {STEPS} steps"
    for part, words in (("ids", "ids"), ("bytes", "8-bit values"), ("floats", f"floats of {WHOLE} images")):
        if here[part] != there[part]:
            found[part] = difference_of_arrays(unpacked(here[part]), unpacked(there[part]), words)
    if here["all floats"] != there["all floats"] and here["floats"] == there["floats"]:
        found["all floats"] = f"differ, but not in the first {WHOLE} images"
    return found


def difference_of_losses(ours: list[str], theirs: list[str]) -> str:
    """The first step that differs, and the largest difference of any."""
    if len(ours) != len(theirs):
        return f"{len(ours)} steps, not {len(theirs)}"
    pairs = [(float.fromhex(a), float.fromhex(b)) for a, b in zip(ours, theirs, strict=True)]
    first = next(step for step, (a, b) in enumerate(pairs, 1) if a != b)
    return f"from step {first} on, by up to {max(abs(a - b) / max(abs(b), 1e-30) for a, b in pairs):.1e} of the loss"


def difference_of_arrays(ours: np.ndarray, theirs: np.ndarray, what: str) -> str:
    """How many values differ, and by how much at most."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{ours.dtype} {ours.shape}, not {theirs.dtype} {theirs.shape}"
    off = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return f"{int((off > 0).sum())} of {off.size} {what}, by up to {off.max():.2g}"


def main() -> None:
    """Print a row of this process; `add`: write those of this machine, with each limit, into the table."""
    import torch

    if sys.argv[1:] == ["add"]:
        rows = read_table()
        for limits, threads in SETTINGS:
            rows = merged(rows, [told_by(limits, threads)])
            write_table(rows)
        return

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    found = bits()
    print(json.dumps({"machine": machine(), "bits": found}))


if __name__ == "__main__":
    main()
