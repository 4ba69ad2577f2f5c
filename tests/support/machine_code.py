"""What the machine code of a compiled kernel holds: instructions, registers, loops.

`read_nvidia` and `read_amd` return fields of `aot.Compiled`. NVIDIA's code is disassembled here:
what Triton keeps as its own disassembly ends early where code is specialised by warp.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, NamedTuple

from triton import knobs

# Matrix instructions: mma (sm_80), wgmma (sm_90), tcgen05 (sm_100). gfx942 has v_mfma_*.
SASS_MMA = ("HMMA", "IMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")
EXP2 = "MUFU.EX2"


class Instruction(NamedTuple):
    """One line of machine code; `name` without modifiers."""

    address: int
    name: str
    text: str


def read_nvidia(asm: Any, log: str) -> dict[str, Any]:
    """Fields of Compiled from the machine code and from the log of ptxas -v."""
    sass = disassembled(asm["cubin"])
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    assert registers, f"no registers in the log of ptxas: {log!r}"
    assert spills, f"no spills in the log of ptxas: {log!r}"
    load, store = r"\b(?:LDG|LDGSTS|UTMALDG)\b", r"\b(?:STG|UTMASTG)\b"
    wide = r"[.\w]*\.(?:128|256)\b"
    code = instructions(sass)
    mma = {name: _count(rf"\b{name}\b", sass) for name in SASS_MMA}
    return {
        "registers": max(int(n) for n in registers),
        "spill_bytes": sum(int(n) for pair in spills for n in pair),
        "mma": {name: count for name, count in mma.items() if count},
        "loads": _count(load, sass),
        "loads_128": _count(load + wide, sass),
        "stores": _count(store, sass),
        "stores_128": _count(store + wide, sass),
        "tma_loads": _count(r"\bUTMALDG\b", sass),
        "tma_stores": _count(r"\bUTMASTG\b", sass),
        "specialized": sorted(
            {int(n) for n in re.findall(r"setmaxnreg\S*\.u32\s+(\d+)", asm["ptx"])}, reverse=True
        ),
        "product_loop": _as_dict(product_loop(code)),
        "epilogue": _as_dict(epilogue(code)),
    }


def read_amd(asm: Any, log: str) -> dict[str, Any]:
    """Fields of Compiled from the assembly and from the metadata at its end."""
    code = asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", code)
    scratch = re.search(r"\.private_segment_fixed_size:\s+(\d+)", code)
    assert registers, "no vgpr_count in the metadata of the assembly"
    assert scratch, "no private_segment_fixed_size in the metadata of the assembly"
    load, store = r"\b(?:global|buffer|flat)_load_", r"\b(?:global|buffer|flat)_store_"
    mfma = _count(r"\bv_mfma_", code)
    return {
        "registers": int(registers[1]),
        "spill_bytes": int(scratch[1]),
        "mma": {"mfma": mfma} if mfma else {},
        "loads": _count(load, code),
        "loads_128": _count(load + "dwordx4", code),
        "stores": _count(store, code),
        "stores_128": _count(store + "dwordx4", code),
        "tma_loads": 0,
        "tma_stores": 0,
        "specialized": [],
        "product_loop": {},
        "epilogue": {},
    }


def disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "EXIT" in done.stdout, "cuobjdump printed no machine code"
    return done.stdout


def instructions(sass: str) -> list[Instruction]:
    found = []
    for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;/]+);", sass):
        words = text.split()
        name = words[1] if words[0].startswith("@") else words[0]
        found.append(Instruction(int(address, 16), name.split(".")[0], text.strip()))
    return found


def product_loop(code: list[Instruction]) -> list[Instruction]:
    """The shortest loop that holds a matrix instruction: one step along D of one warp group."""
    at = {x.address: i for i, x in enumerate(code)}
    loops = []
    for i, x in enumerate(code):
        target = re.search(r"\bBRA[.\w]*\s+(?:\w+,\s*)*(?:`\(.*\)|0x([0-9a-f]+))", x.text)
        if target and target[1] and at.get(int(target[1], 16), i + 1) <= i:
            body = code[at[int(target[1], 16)] : i + 1]
            if any(y.name in SASS_MMA for y in body):
                loops.append(body)
    return min(loops, key=len, default=[])


def epilogue(code: list[Instruction]) -> list[Instruction]:
    """What a thread does of a tile after its products, where it takes exponentials.

    From the matrix instruction, or the start of the warp group's code, before the first exp2 to
    the next of either, or to the end.
    """
    edges = [i for i, x in enumerate(code) if x.name in (*SASS_MMA, "USETMAXREG", "EXIT")]
    exps = [i for i, x in enumerate(code) if EXP2 in x.text]
    if not exps or not any(x.name in SASS_MMA for x in code):
        return []
    parts = [code[a:b] for a, b in zip([0, *edges], [*edges, len(code)], strict=True)]
    return max(parts, key=lambda part: sum(EXP2 in x.text for x in part))


def _as_dict(code: list[Instruction]) -> dict[str, int]:
    """Instructions by name, the most frequent first."""
    return dict(Counter(x.name for x in code).most_common())


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text))
