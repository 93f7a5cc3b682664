"""Reading machine code: SASS as nvdisasm prints it, and AMD assembly as LLVM does."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LABEL = re.compile(r"^\s*(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Za-z][\w.]*)(.*)")
_BRANCH = re.compile(r"^(?:BRA|s_c?branch)")
_ASYNC_COPY = re.compile(r"^(?:LDGSTS|UBLKCP|UTMALDG)")
_BULK_COPY = re.compile(r"^(?:UBLKCP|UTMALDG)")
_LOAD = re.compile(r"^(?:LDG|LDGSTS|UBLKCP|UTMALDG|global_load|buffer_load)[._]")
_STORE = re.compile(r"^(?:STG|global_store|buffer_store)[._]")


@dataclass(frozen=True)
class Code:
    """Counts of a kernel's machine code. The loop is the innermost one with matrix instructions, empty if none has any.

    Attributes:
        registers: per thread.
        spills: what does not fit in registers: local loads and stores, or AMD's count of spilled registers.
        matrix_instructions: in all the code.
        loop_instructions, loop_matrix_instructions, loop_async_copies: of that loop.
        load_bits: narrowest global load of that loop; without one, widest of the kernel. A copy by TMA, whose rows are of 16
            bytes or more, is one of 128.
        store_bits: widest global store.
    """

    registers: int
    spills: int
    matrix_instructions: int
    loop_instructions: int
    loop_matrix_instructions: int
    loop_async_copies: int
    load_bits: int
    store_bits: int


def read_cubin(asm: Mapping[str, Any], matrix_instruction: str) -> Code:
    """NVIDIA: registers a thread, and local loads and stores for spills, with the tools that Triton ships."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        text = _output(knobs.nvidia.nvdisasm.path, "-c", file.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump printed no register count: {usage}")
    return read(text, matrix_instruction, int(registers[1]), len(re.findall(r"\b(?:LDL|STL)\b", text)))


def read_amdgcn(asm: Mapping[str, Any], matrix_instruction: str) -> Code:
    """AMD: vector registers a thread (accumulation registers among them) and spills from the code object's metadata."""
    text = asm["amdgcn"]
    counts = {name: int(number) for name, number in re.findall(r"\.(\w+_count):\s*(\d+)", text)}
    spills = counts["vgpr_spill_count"] + counts["sgpr_spill_count"]
    return read(text, matrix_instruction, counts["vgpr_count"], spills)


def read(text: str, matrix_instruction: str, registers: int, spills: int) -> Code:
    """Count instructions in a listing, and in its innermost loop with matrix instructions."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    loops: list[range] = []
    is_matrix = re.compile(matrix_instruction)
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            name, operands = instruction[1], instruction[2]
            code.append((name, operands))
            target = re.search(r"\.L\w+", operands)
            if _BRANCH.match(name) and target and target[0] in labels:
                loops.append(range(labels[target[0]], len(code)))
    matrix = [index for index, (name, _) in enumerate(code) if is_matrix.match(name)]
    holding = [loop for loop in loops if any(index in loop for index in matrix)]
    loop = min(holding, key=len, default=range(0))
    in_loop = [code[index] for index in loop]
    loads = [_bits(*each) for each in (in_loop or code) if _LOAD.match(each[0])]
    return Code(
        registers=registers,
        spills=spills,
        matrix_instructions=len(matrix),
        loop_instructions=len(in_loop),
        loop_matrix_instructions=sum(bool(is_matrix.match(name)) for name, _ in in_loop),
        loop_async_copies=sum(bool(_ASYNC_COPY.match(name)) for name, _ in in_loop),
        load_bits=(min if in_loop else max)(loads, default=0),
        store_bits=max((_bits(*each) for each in code if _STORE.match(each[0])), default=0),
    )


def _bits(name: str, operands: str) -> int:
    """Width of a load or store: a suffix in SASS (LDG.E.128, 32 without one), part of the name on AMD (dwordx4)."""
    if name[0].islower():
        dwords = re.search(r"_dword(?:x(\d))?|_b(\d+)", name)
        return 16 if dwords is None else int(dwords[2]) if dwords[2] else 32 * int(dwords[1] or 1)
    if _BULK_COPY.match(name):
        return 128
    for suffix in name.split(".")[1:]:
        if suffix in ("64", "128", "256"):
            return int(suffix)
        if suffix in ("U8", "S8", "U16", "S16"):
            return int(suffix[1:])
    return 32


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout
