"""The time of one call of fused_linear_rloo_loss, predicted: python -m benchmarks.tuning.cost_model

Ratios to the floor, 6 N D V FLOPs at the rate of a library's product, today and with each part of
the plan on top of those before it; `assumptions.py` has every number that goes in. Pieces are
those of the real planner. `--parts` prints where the time goes, in ms. `--measured FILE` sets the
time of the present code beside what `benchmarks.loss --job linear --json FILE` measured on a GPU.

    a product    waves x (depth + the tile's own steps) x a step's time, or its bytes if longer
    the head     likewise, and the instructions beside the products that nothing hides
    the rest     bytes / the copy's rate, and a launch's time for each launch

Letters: N rows in all, n rows of a piece, D hidden size, V vocabulary. A KL in the reward, dX and
dW, bf16, chunks that may end anywhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from rloo_kernels.lm_head.piece import PIECE_BYTES_HALF, planned_bytes
from rloo_kernels.lm_head.waves import (
    REDUCE_ADD_MOST_ROWS,
    STEP_FLOPS,
    TILE,
    TILE_STEPS,
    TILE_WIDE,
    HeadShape,
    Pieces,
    best_parts,
    num_tiles,
    num_waves,
)

from benchmarks.common import harness
from benchmarks.tuning import assumptions as given
from benchmarks.tuning.assumptions import DEVICES, GIB, Device, HeadKernel

SHAPES = {  # D, V: DESIGN.md section 3
    "pythia-410m": (1024, 50304),
    "pythia-1b": (2048, 50304),
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
}
NUM_ROWS = 16384


@dataclass(frozen=True)
class Design:
    """Which parts of the plan are in."""

    name: str
    kernel: HeadKernel = given.TODAY
    planned: bool = False  # pieces by waves and free memory
    wide_combine: bool = False  # and the redo by a list
    one_pass_outputs: bool = False
    reduce_add: bool = False


_PIECES = replace(Design("today"), name="+1 pieces", planned=True)
_SUMS = replace(_PIECES, name="+2 combine", wide_combine=True, kernel=given.NO_MAXIMUM)
_TMA = replace(_SUMS, name="+3 TMA", kernel=given.SPECIALISED)
_OUTPUTS = replace(_TMA, name="+4 outputs", one_pass_outputs=True)
_LIBRARY = replace(_OUTPUTS, name="+5 library", kernel=given.LIBRARY_EPILOGUE)
_REDUCE_ADD = replace(_LIBRARY, name="+6 reduce-add", reduce_add=True)
DESIGNS = [Design("today"), _PIECES, _SUMS, _TMA, _OUTPUTS, _LIBRARY, _REDUCE_ADD]
# what this commit's code does
CURRENT = Design("current", planned=True, one_pass_outputs=True, reduce_add=True)


@dataclass(frozen=True)
class Call:
    """One call: N rows of a head (D, V) on a device with `free_bytes` free."""

    num_rows: int
    hidden_size: int
    vocab_size: int
    device: Device
    free_bytes: int

    @property
    def floor(self) -> float:
        flops = 6 * self.num_rows * self.hidden_size * self.vocab_size
        return flops / self.device.flops_per_s

    @property
    def step(self) -> float:
        """Seconds of a step: a tile of a library's product, one unit of depth deeper.

        The device's rate has its tiles' own steps in it.
        """
        rate = self.device.flops_per_s * (1 + TILE_STEPS / self.device.rate_depth)
        return STEP_FLOPS * self.device.num_processors / rate

    def pieces(self, design: Design) -> list[int]:
        """Rows of each piece, as `piece.planned_rows` and `Pieces.cut` decide."""
        n, depth, vocab = self.num_rows, self.hidden_size, self.vocab_size
        budget, shape = PIECE_BYTES_HALF, None
        if design.planned:
            all_bytes, spared = 2 * n * vocab, 4 * vocab * depth
            budget = planned_bytes(all_bytes, self.free_bytes, spared) or PIECE_BYTES_HALF
            shape = HeadShape(depth, vocab, self.device.num_processors)
        most = min(n, budget // (2 * vocab))
        return [x.stop - x.start for x in Pieces(most, shape).cut(0, n)]

    # Parts, in seconds

    def moved(self, num_bytes: float) -> float:
        return num_bytes / self.device.bytes_per_s

    def product(self, rows: int, columns: int, depth: int, stored: int, num_bytes: float) -> float:
        """A library's, with (rows, columns) results; `stored`: bytes of a result, loads included.

        num_bytes: what it loads and stores in all.
        """
        tile = depth + TILE_STEPS * stored / 2
        waves = num_waves(rows, columns, self.device.num_processors)
        return max(waves * tile * self.step, self.moved(num_bytes))

    def head(self, n: int, kernel: HeadKernel) -> float:
        """The kernel of the exponentials on n rows."""
        depth, vocab, device = self.hidden_size, self.vocab_size, self.device
        tiles_n, tiles_v = -(-n // TILE), -(-vocab // TILE_WIDE)
        waves = -(-tiles_n * tiles_v // device.num_processors)
        issue = kernel.instructions * kernel.num_warps / given.SCHEDULERS
        special = kernel.exponentials * kernel.num_warps / given.SCHEDULERS * given.CLOCKS_PER_MUFU
        beside = max(issue, special) / device.clock_hz
        seconds = depth * self.step / kernel.product_rate
        hidden = min(kernel.hidden_steps, depth) * self.step / kernel.product_rate
        total = waves * (seconds + max(0.0, beside - hidden))
        # W once for all row tiles that run together, X again for each column tile, unless it stays
        x_bytes, w_bytes = 2 * n * depth, 2 * vocab * depth
        if kernel.groups_rows:
            loaded = x_bytes + w_bytes * max(1.0, x_bytes / given.GROUP_BYTES)
        else:
            loaded = w_bytes + x_bytes * (1 if x_bytes <= device.l2_bytes else tiles_v)
        return max(total, self.moved(loaded + 2 * n * vocab))

    def sums_of_rows(self, n: int, design: Design) -> float:
        """Label logits, combine and redo, without the rows that are redone."""
        tiles_v = -(-self.vocab_size // TILE_WIDE)
        label = self.moved(4 * n * self.hidden_size)
        if design.wide_combine:
            return label + self.moved(4 * n * tiles_v)
        tiles = -(-n // TILE) * tiles_v
        return label + 2 * tiles_v * given.COMBINE_S_PER_TILE + tiles * given.REDO_S_PER_PROGRAM

    def hidden_gradient(self, n: int, design: Design) -> float:
        depth, vocab, processors = self.hidden_size, self.vocab_size, self.device.num_processors
        waves = num_waves(n, depth, processors)
        loaded = 2 * n * vocab + waves * 2 * vocab * depth  # W anew for the rows of each wave
        parts = best_parts(n, depth, vocab, processors)[1] if design.planned else 1
        waves = -(-num_tiles(n, depth) * parts // processors)
        made = waves * (vocab / parts + 2 * TILE_STEPS) * self.step
        added = self.moved((8 * parts + 4) * n * depth) if parts > 1 else 0.0
        return max(made, self.moved(loaded + 4 * n * depth)) + added

    def weight_gradient(self, n: int, design: Design, stored: int) -> float:
        """`stored`: 2 in one piece; else 4 for the first, 8 where the sum is loaded as well."""
        depth, vocab = self.hidden_size, self.vocab_size
        waves = num_waves(vocab, depth, self.device.num_processors)
        x_bytes = 2 * n * depth
        again = 1 if x_bytes <= self.device.l2_bytes else waves
        num_bytes = 2 * n * vocab + x_bytes * again + stored * vocab * depth
        if design.reduce_add and stored == 8 and n <= REDUCE_ADD_MOST_ROWS:
            tile = n / given.REDUCE_ADD_RATE + TILE_STEPS * 2
            return max(waves * tile * self.step, self.moved(num_bytes))
        return self.product(vocab, depth, n, stored, num_bytes)

    def parts(self, design: Design) -> dict[str, float]:
        """Seconds of a call by what takes them."""
        found: defaultdict[str, float] = defaultdict(float)
        depth, vocab, pieces = self.hidden_size, self.vocab_size, self.pieces(design)
        launches = given.LAUNCHES["new" if design.wide_combine else "today"]
        for i, n in enumerate(pieces):
            stored = 2 if len(pieces) == 1 else 4 if i == 0 else 8
            found["head"] += self.head(n, design.kernel)
            found["combine, redo"] += self.sums_of_rows(n, design)
            found["dX"] += self.hidden_gradient(n, design)
            found["dW"] += self.weight_gradient(n, design, stored)
            # bytes of dX beside its product's, and of c X: tests/.../test_outputs_on_gpu.py
            each = 6 + 4 if design.one_pass_outputs else 18 + 12
            found["outputs"] += self.moved(each * n * depth)
            found["launches"] += (launches + 2) * given.LAUNCH_S
        several = 6 if design.one_pass_outputs else 6 + 4
        zeros = 0 if design.one_pass_outputs else 2
        out = (4 if len(pieces) == 1 else several) * vocab * depth
        out += (4 + zeros) * self.num_rows * depth  # dX by backward's factor
        found["outputs"] += self.moved(out)
        found["launches"] += given.LAUNCHES_OF_A_CALL * given.LAUNCH_S
        return dict(found)

    def seconds(self, design: Design) -> float:
        return sum(self.parts(design).values())

    def ratio(self, design: Design) -> float:
        return self.seconds(design) / self.floor


def table(device: Device, free_bytes: int, num_rows: int = NUM_ROWS) -> str:
    """Ratios to the floor, a line per shape, a column per design; and the pieces before, after."""
    names = "".join(f"{design.name:>15}" for design in DESIGNS)
    lines = [f"{device.name}, {free_bytes / GIB:g} GiB free, N = {num_rows}"]
    lines.append(f"{'':14}{'D':>5}{'V':>8}{'floor ms':>10}{names}   pieces")
    for name, (depth, vocab) in SHAPES.items():
        call = Call(num_rows, depth, vocab, device, free_bytes)
        ratios = "".join(f"{call.ratio(design):>15.3f}" for design in DESIGNS)
        cuts = " -> ".join(in_words(call.pieces(DESIGNS[i])) for i in (0, 1))
        lines.append(f"{name:14}{depth:>5}{vocab:>8}{call.floor * 1e3:>10.2f}{ratios}   {cuts}")
    return "\n".join(lines)


def in_words(pieces: list[int]) -> str:
    """[2304, 2304, 256] -> "2 x 2304 + 256"."""
    runs = [(n, len(list(run))) for n, run in itertools.groupby(pieces)]
    return " + ".join(f"{count} x {n}" if count > 1 else str(n) for n, count in runs)


def parts_table(call: Call) -> str:
    """Milliseconds by part, a column per design."""
    columns = [call.parts(design) for design in DESIGNS]
    lines = [f"{'ms':14}" + "".join(f"{design.name:>15}" for design in DESIGNS)]
    for part in columns[0]:
        lines.append(f"{part:14}" + "".join(f"{x[part] * 1e3:>15.2f}" for x in columns))
    lines.append(f"{'all':14}" + "".join(f"{sum(x.values()) * 1e3:>15.2f}" for x in columns))
    return "\n".join(lines)


def beside_measured(path: Path) -> list[dict[str, object]]:
    """Measured and predicted seconds of the rows of `path` that are ours, in bf16.

    The floor's rate is the one measured there; a GPU that is not in DEVICES has no prediction.
    """
    env, rows = harness.read_json(path)
    device = next((d for name, d in DEVICES.items() if name in str(env["gpu"])), None)
    found: list[dict[str, object]] = []
    for row in rows:
        if (row.benchmark, row.provider, row.dtype) != ("linear", "ours", "bfloat16"):
            continue
        sizes = {k: int(x) for k, x in (part.split("=") for part in row.shape.split()[1:])}
        line: dict[str, object] = {"shape": row.shape, "measured_s": row.seconds_median}
        if device is None or row.floor_seconds is None:
            line |= {"predicted_s": None, "why": f"no assumptions for {env['gpu']}, or no floor"}
        else:
            n, depth, vocab = sizes["N"], sizes["D"], sizes["V"]
            rate = 6 * n * depth * vocab / row.floor_seconds
            on = replace(device, flops_per_s=rate, rate_depth=depth)  # harness: depth D
            call = Call(n, depth, vocab, on, 64 * GIB)  # a GPU with nothing else on it
            line |= {"predicted_s": call.seconds(CURRENT), "parts_s": call.parts(CURRENT)}
        found.append(line)
    return found


def in_lines(found: list[dict[str, object]]) -> str:
    lines = [f"{'measured ms':>12}{'predicted ms':>14}  shape"]
    for line in found:
        cells = [line["measured_s"], line["predicted_s"]]
        ms = [f"{x * 1e3:.2f}" if isinstance(x, float) else "-" for x in cells]
        lines.append(f"{ms[0]:>12}{ms[1]:>14}  {line['shape']} {line.get('why', '')}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning.cost_model")
    parser.add_argument("--device", action="append", choices=list(DEVICES))
    parser.add_argument("--free-gib", default="40,10,2", help="free memory, of each table")
    parser.add_argument("--rows", type=int, default=NUM_ROWS)
    parser.add_argument("--parts", action="store_true", help="where the time goes, per shape")
    parser.add_argument("--measured", type=Path, help="JSON of benchmarks.loss --job linear")
    parser.add_argument("--json", type=Path, help="write measured and predicted seconds here")
    args = parser.parse_args(argv)
    if args.measured is not None:
        if not args.measured.exists():
            parser.error(f"--measured: {args.measured} does not exist; was the loss measured?")
        found = beside_measured(args.measured)
        print(in_lines(found))
        if args.json is not None:
            content = {"env": harness.environment(), "rows": found}
            args.json.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    for name, gib in itertools.product(args.device or DEVICES, args.free_gib.split(",")):
        device, free = DEVICES[name], int(float(gib) * GIB)
        print(table(device, free, args.rows), end="\n\n")
        for shape, (depth, vocab) in SHAPES.items() if args.parts else ():
            call = Call(args.rows, depth, vocab, device, free)
            print(f"{shape}, {name}, {gib} GiB free\n{parts_table(call)}\n")
    print("Peers: " + "; ".join(f"{name}: {x:.2f}" for name, x in given.PEERS.items()) + ".")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
