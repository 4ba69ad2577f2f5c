"""`rloo-fast plan`: memory per GPU and traffic per step of a run that is still on paper."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from ..offload.memory_plan import Holdings, plan
from ..planning import memory
from ..planning.memory import GIB, Setup
from ..planning.shapes import SHAPES, find_shape
from ..planning.traffic import NETWORK, NVLINK, traffic
from .options import UsageError
from .parser import Parser

TP = (1, 2, 4, 8)
LEAST_CACHE = 8192  # tokens, without which an engine is of no use
EPILOG = """\
Several models, numbers of GPUs or engines, separated by commas, print one line each:
  rloo-fast plan --model 7b,32b,70b --gpus 8,64,256 --engine fsdp2,zero3
The formulas are documented in rloo_fast/planning/memory.py and traffic.py."""


def main(argv: list[str]) -> int:
    """Print the plan, or a table of plans. Exit status 0, whether it fits or not."""
    options = _parser().parse_args(argv)
    try:
        setups = list(_setups(options))
    except ValueError as error:
        raise UsageError(str(error)) from error
    if len(setups) == 1:
        print(as_text(*setups[0]))
    else:
        print(as_table(setups))
    if options.csv:
        _write(options.csv, [as_row(name, setup) for name, setup in setups])
    return 0


def _write(path: str, rows: list[dict[str, Any]]) -> None:
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
            writer.writeheader()
            writer.writerows(rows)
    except OSError as error:
        raise UsageError(f"--csv {path}: {error.strerror}.") from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser("rloo-fast plan", __doc__, EPILOG)
    add, default = parser.add_argument, Setup
    known = ", ".join(SHAPES)
    add("--model", required=True, help=f"{known}, or a local directory with a config.json")
    add("--gpus", required=True, help="GPUs in all")
    add("--engine", default=default.engine, help=f"{', '.join(memory.ENGINES)} [%(default)s]")
    add("--gpus_per_node", type=int, default=default.gpus_per_node, help="[%(default)s]")
    add("--hybrid", action="store_true", help="FSDP2: split inside a node, a copy on each node")
    add("--tokens", type=int, default=default.tokens, help="per micro-batch and GPU [%(default)s]")
    add("--micro_batches", type=int, default=default.micro_batches, help="a step [%(default)s]")
    add("--beta", type=float, default=default.beta, help="0: no reference model [%(default)s]")
    add("--lora", type=int, default=0, metavar="RANK", help="train adapters only")
    add("--lora_targets", default=",".join(default.lora_targets), help="[%(default)s]")
    add("--dtype", default=default.dtype, help=f"{', '.join(memory.DTYPES)} [%(default)s]")
    checkpointing = argparse.BooleanOptionalAction
    add("--checkpointing", action=checkpointing, default=True, help="of activations [on]")
    add("--vllm_share", type=float, default=default.vllm_share, help="0: no engine [%(default)s]")
    add("--tp", type=int, help="GPUs that share an engine [the fewest whose share holds it twice]")
    gib = default.gpu_memory_gib
    add("--gpu_memory_gib", type=float, default=gib, help="[%(default)s, an H200]")
    add("--csv", metavar="FILE", help="every figure, in bytes and seconds, one row per plan")
    return parser


def _setups(options: argparse.Namespace) -> Iterator[tuple[str, Setup]]:
    given = vars(options).copy()
    models, gpus, engines = (given.pop(name).split(",") for name in ("model", "gpus", "engine"))
    given.pop("csv")
    tp, given["lora_targets"] = given.pop("tp"), tuple(given["lora_targets"].split(","))
    for model in models:
        shape = find_shape(model)
        for number in gpus:
            if not number.isdecimal():
                raise ValueError(f"--gpus must be a whole number, got {number!r}.")
            for engine in engines:
                setup = Setup(shape=shape, gpus=int(number), engine=engine, **given)
                yield model, replace(setup, tp=tp) if tp is not None else _with_tp(setup)


def _with_tp(s: Setup) -> Setup:
    """The fewest GPUs per engine that leave it as much for its cache as its weights take."""
    most = min(s.gpus, s.gpus_per_node)
    possible = [tp for tp in TP if tp <= most and not (most % tp or s.shape.heads % tp)]
    roomy = (tp for tp in possible if _is_roomy(replace(s, tp=tp)))
    return replace(s, tp=next(roomy, possible[-1])) if s.vllm_share else s


def _is_roomy(s: Setup) -> bool:
    return memory.engine_cache(s) >= memory.engine_weights(s)


# Whether it fits


def spare(s: Setup) -> tuple[float, float]:
    """Bytes per GPU left over in the update and, with an engine, in the rollout; < 0: missing."""
    total = s.gpu_memory_gib * GIB
    update = total - memory.update_peak(s)
    if not s.vllm_share:
        return update, update
    cache = memory.engine_cache(s) - LEAST_CACHE * memory.cache_bytes(s)
    return update, min(total - memory.rollout_peak(s), cache)


def fits(s: Setup) -> bool:
    return min(spare(s)) >= 0


def remedies(s: Setup) -> list[str]:
    """Single changes after which the run fits, in the words of the command line."""
    changes: list[tuple[str, dict[str, Any]]] = []
    if not s.checkpointing:
        changes.append(("--checkpointing", {"checkpointing": True}))
    halves = [s.tokens >> k for k in range(1, 6) if s.tokens >> k >= 512]
    changes += [(f"--tokens {tokens}", {"tokens": tokens}) for tokens in halves]
    if s.hybrid:
        changes.append(("no --hybrid", {"hybrid": False}))
    if s.engine not in memory.SPLITS_WEIGHTS:
        changes += [(f"--engine {name}", {"engine": name}) for name in memory.SPLITS_WEIGHTS]
    more = [s.gpus * 2**k for k in range(1, 6)]
    changes += [(f"--gpus {n}", {"gpus": n}) for n in more if n % s.gpus_per_node == 0]
    if s.vllm_share:
        most = min(s.gpus, s.gpus_per_node)
        possible = [tp for tp in TP if s.tp < tp <= most and not (most % tp or s.shape.heads % tp)]
        changes += [(f"--tp {tp}", {"tp": tp}) for tp in possible]
        shares = [share / 10 for share in range(1, 10)]
        changes += [(f"--vllm_share {share}", {"vllm_share": share}) for share in shares]
        changes.append(("--vllm_share 0 and a vLLM server", {"vllm_share": 0.0, "tp": 1}))
    if not s.lora:
        changes.append(("--lora 16", {"lora": 16}))
    enough: dict[str, str] = {}  # the first, that is the mildest, of each kind
    for text, change in changes:
        if text.split()[0] not in enough and _fits_with(s, change):
            enough[text.split()[0]] = text
    return list(enough.values())


def _fits_with(s: Setup, change: dict[str, Any]) -> bool:
    try:
        return fits(replace(s, **change))
    except ValueError:  # it does not go together with the rest
        return False


# What is printed


def as_text(name: str, s: Setup) -> str:
    """One plan: memory in the update and in the rollout, traffic, and whether it fits."""
    where = f"{s.gpus} GPUs" + (f" ({s.nodes} nodes)" if s.nodes > 1 else "")
    lines = [
        f"{name}: {s.params:,} parameters, {s.trained:,} trained; {s.engine}"
        f"{' (hybrid)' if s.hybrid else ''} on {where}, {s.dtype}",
        f"{s.micro_batches} micro-batches of {s.tokens} tokens per GPU and step, "
        f"{'with' if s.checkpointing else 'without'} checkpointing",
        "",
        f"{'Update: GiB per GPU':<36}{s.gpu_memory_gib:>9.2f}",
    ]
    always = {**memory.held(s), "activations": memory.activations(s), "reserve": memory.RESERVE}
    lines += [_line(label, size) for label, size in always.items()]
    moments = {"loss": memory.at_the_loss(s), "backward": memory.in_backward(s)}
    fullest = max(moments, key=lambda moment: sum(moments[moment].values()))
    for moment, parts in moments.items():
        note = " (counts)" if moment == fullest else ""
        lines += [_line(f"{moment}: {label}", size, note) for label, size in parts.items()]
    lines.append(_line("in use, at most", memory.update_peak(s)))
    lines += [*_rollout_lines(s), "", *_traffic_lines(s), "", _verdict(s)]
    return "\n".join(lines)


def _line(label: str, size: float, note: str = "") -> str:
    return f"  {label:<34}{size / GIB:>9.2f}{note}"


def _rollout_lines(s: Setup) -> list[str]:
    if not s.vllm_share:
        return []
    parts = memory.in_rollout(s)
    total = int(s.gpu_memory_gib * GIB)
    engine = int(parts["rollout engine"])
    stays = int(sum(parts.values()) - memory.movable(s)) - engine
    reference = int(parts.get("reference", 0))
    sizes = {"optimizer": int(memory.movable(s)) - reference, "reference": reference}
    holdings = Holdings(stays, 0, sizes["optimizer"], reference)
    try:
        moved = plan(total, engine, holdings, memory.RESERVE).moved
    except ValueError:  # not even with both on the host
        moved = tuple(sizes)
    goes = [name for name in moved if sizes.get(name)]
    gone = sum(sizes[name] for name in goes)
    cache = max(0, int(memory.engine_cache(s) // memory.cache_bytes(s)))
    shared = f", {s.tp} GPUs an engine" if s.tp > 1 else ""
    return [
        "",
        f"Rollout: GiB per GPU{shared}",
        *(_line(label, size) for label, size in parts.items()),
        _line("reserve", memory.RESERVE),
        _line("moved to the host", -gone, f" ({', '.join(goes) or 'nothing'})"),
        _line("in use", memory.RESERVE + sum(parts.values()) - gone),
        f"  of the engine's share, {memory.engine_weights(s) / GIB:.2f} are weights; "
        f"room for {cache:,} tokens of cache per engine",
    ]


def _traffic_lines(s: Setup) -> list[str]:
    moves = traffic(s)
    head = f"{'GB per GPU and step':<26}{'':<16}{'NVLink':>9}{'network':>9}{'seconds >=':>12}"
    lines = [head]
    for move in moves:
        lines.append(
            f"  {move.what:<24}{move.collective:<16}{move.nvlink / 1e9:>9.1f}"
            f"{move.network / 1e9:>9.1f}{move.seconds:>12.2f}"
        )
    lines.append(f"  {'in all':<58}{sum(move.seconds for move in moves):>12.2f}")
    speeds = f"{NVLINK / 1e9:.0f} GB/s of NVLink and {NETWORK / 1e9:.0f} GB/s of network per GPU"
    return [*lines, f"  at {speeds}; most of it overlaps with computing"]


def _verdict(s: Setup) -> str:
    update, rollout = spare(s)
    if fits(s):
        left = f"{update / GIB:.1f} GiB to spare in the update"
        return f"Fits: {left}" + (f", {rollout / GIB:.1f} in the rollout." if s.vllm_share else ".")
    missing = [
        f"{-left / GIB:.1f} GiB missing in the {phase}"
        for phase, left in {"update": update, "rollout": rollout}.items()
        if left < 0 and (phase == "update" or s.vllm_share)
    ]
    options = remedies(s)
    advice = f"Any of these is enough: {'; '.join(options)}." if options else (
        "No single change is enough: combine more GPUs, fewer tokens, LoRA and a vLLM server."
    )  # fmt: skip
    return f"Does not fit: {' and '.join(missing)}. {advice}"


def as_row(name: str, s: Setup) -> dict[str, Any]:
    """Every figure of a plan under a name of its own: bytes per GPU, seconds, true or false."""
    row: dict[str, Any] = {"model": name}
    row |= {field.name: getattr(s, field.name) for field in fields(s) if field.name != "shape"}
    row |= {"parameters": s.params, "trained": s.trained}
    parts = {"held": memory.held(s), "loss": memory.at_the_loss(s)}
    parts |= {"backward": memory.in_backward(s), "rollout": memory.in_rollout(s)}
    for moment, sizes in parts.items():
        row |= {f"{moment}: {label}": round(size) for label, size in sizes.items()}
    row |= {"activations": memory.activations(s), "reserve": memory.RESERVE}
    row |= {"update": round(memory.update_peak(s)), "in rollout": round(memory.rollout_peak(s))}
    row |= {"cache": round(memory.engine_cache(s)), "fits": fits(s)}
    for move in traffic(s):
        row |= {f"{move.what}: NVLink": round(move.nvlink), f"{move.what}: s": move.seconds}
        row[f"{move.what}: network"] = round(move.network)
    return row


def as_table(setups: list[tuple[str, Setup]]) -> str:
    """A line per plan, in Markdown: GiB per GPU, GB per GPU and step, seconds."""
    lines = [
        "| model | GPUs | engine | stays | update | rollout | fits | NVLink, network | s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, s in setups:
        moves = traffic(s)
        sizes = (sum(memory.held(s).values()), memory.update_peak(s), memory.rollout_peak(s))
        cells = [name, str(s.gpus), s.engine, *(f"{size / GIB:.1f}" for size in sizes)]
        cells.append("yes" if fits(s) else "no")
        sent = (sum(m.nvlink for m in moves), sum(m.network for m in moves))
        cells.append(", ".join(f"{size / 1e9:,.0f}" for size in sent))
        cells.append(f"{sum(m.seconds for m in moves):.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
