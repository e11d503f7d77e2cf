"""PTX, the assembly that Triton's compiler writes for NVIDIA's GPUs, as Python functions on numpy.

`Program` reads a kernel and turns each run of instructions without a branch into one function of a
warp: a register is an array of 32 numbers, one a thread. What reaches beyond a warp's registers is
a call of its block's methods, see `emulator`. It knows the instructions that Triton 3.6 to 3.8
write for this package's kernels, and refuses others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

F16, F32, F64 = np.float16, np.float32, np.float64
U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I32, I64 = np.int32, np.int64
LANES = np.arange(32)

# a register's type by the first letters of its name, longest first
REGISTERS = {"%rd": "b64", "%rs": "b16", "%r": "b32", "%p": "pred"}
NUMPY = {
    "b8": "U8", "b16": "U16", "u16": "U16", "b32": "U32", "u32": "U32", "s32": "I32",
    "b64": "U64", "u64": "U64", "s64": "I64", "f32": "F32",
}  # fmt: skip

# An instruction's value from its operands; its last type is theirs unless OPERANDS says otherwise.
# What follows its name may be a type or one of MODIFIERS, which either change nothing here or are
# looked at where they do.
FORMULAS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "mul.lo": "{0} * {1}",
    "mad.lo": "{0} * {1} + {2}",
    "mul.wide": "double_width({0}) * double_width({1})",
    "mad.wide": "double_width({0}) * double_width({1}) + {2}",
    "mul.hi": "high_half({0}, {1})",
    "fma": "({0}.astype(F64) * {1} + {2}).astype(F32)",
    "div": "{0} / {1}",
    "rcp": "F32(1) / {0}",
    "sqrt": "np.sqrt({0})",
    "ex2": "np.exp2({0})",
    "lg2": "np.log2({0})",
    "neg": "-{0}",
    "abs": "np.abs({0})",
    "not": "~{0}",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "shl": "shift(np.left_shift, {0}, {1})",
    "shr": "shift(np.right_shift, {0}, {1})",
    "bfe": "bits_of({0}, {1}, {2})",
    "popc": "np.array([bin(x).count('1') for x in {0}], U32)",
    "min": "np.minimum({0}, {1})",
    "max": "np.maximum({0}, {1})",
    "selp": "np.where({2}, {0}, {1})",
    "cvta": "{0}",
    "shfl": "shuffle({0}, {1}, {mode!r})",
    "redux": "np.full(32, getattr(np, {mode!r}).reduce({0}))",
    "vote": "np.full(32, (({0} << LANES).sum()), U32)",
    "setp.eq": "{0} == {1}",
    "setp.ne": "({0} != {1}) & ~unordered({0}, {1})",
    "setp.lt": "{0} < {1}",
    "setp.le": "{0} <= {1}",
    "setp.gt": "{0} > {1}",
    "setp.ge": "{0} >= {1}",
    "setp.neu": "{0} != {1}",
    "setp.ltu": "~({0} >= {1})",
    "setp.gtu": "~({0} <= {1})",
    "setp.num": "~unordered({0}, {1})",
    "setp.nan": "unordered({0}, {1})",
}
# where operands have other types than the instruction's last
OPERANDS = {
    "mad.wide": ("", "", "64"), "shl": ("", "u32"), "shr": ("", "u32"), "selp": ("", "", "pred"),
    "bfe": ("", "u32", "u32"), "shfl": ("b32", "s32"), "vote": ("pred",),
}  # fmt: skip
MODIFIERS = set("rn ftz approx full NaN sync bfly idx up down ballot global".split())
REDUCTIONS = {"add": "add", "min": "minimum", "max": "maximum", "and": "bitwise_and"}
CONVERSIONS = {
    "f16x2.f32": "pair(half({1}), half({0}))",
    "bf16x2.f32": "pair(bfloat({1}), bfloat({0}))",
    "f16.f32": "half({0})",
    "bf16.f32": "bfloat({0})",
    "f32.f16": "{0}.view(F16).astype(F32)",
    "f32.bf16": "({0}.astype(U32) << U32(16)).view(F32)",
    "tf32.f32": "nearest_tf32({0}.view(U32))",
}
# what a register holds that was never written
BAD = {
    "b16": np.full(32, 0xBAD, U16), "b32": np.full(32, 0xBAD, U32),
    "b64": np.full(32, 0xBAD, U64), "pred": np.full(32, False),
}  # fmt: skip
SPECIAL = re.compile(r"%(tid|ctaid|nctaid)\.[xyz]")
REGISTER = re.compile(r"%(rd|rs|r|p)\d+|complete_\d+")
# what all threads of a warp do, or none
UNGUARDED = set(
    "ret bar barrier elect ldmatrix stmatrix mma wgmma setmaxnreg griddepcontrol".split()
)
# what may not come before a wait for the kernel ahead, or may pass it by
TOUCHES = re.compile(r"(ld|st|atom|red)\S*\.global|cp\.async|bra|ret")
# what ends a run of instructions: a branch, and where a warp may have to wait
ENDS = re.compile(r"bra|ret|bar\.sync|barrier\.sync|mbarrier\.try_wait")


class Statement(NamedTuple):
    """One instruction, with the predicate that says which threads do it."""

    opcode: str
    operands: list[str]
    predicate: str | None

    @classmethod
    def read(cls, text: str) -> Statement:
        guard, _, rest = text.partition(" ") if text.startswith("@") else ("", "", text)
        opcode, _, operands = rest.strip().partition(" ")
        return cls(opcode, split(operands), guard[1:] or None)


class Program:
    """A kernel.

    Attributes:
        name: The kernel's.
        threads: Of one block.
        parameters: Names, in order.
        barriers: How many instructions init one.
        has_tensor_memory: Whether it uses tensor memory.
        code: A function of a warp for each run. It returns the number of the next run, -1 at the
            kernel's end, or a tuple that says what the warp waits for.
    """

    def __init__(self, text: str) -> None:
        self.name = _found(r"\.entry\s+(\w+)", text)
        self.threads = int(_found(r"\.reqntid\s+(\d+)", text))
        self.parameters = re.findall(r"\.param\s+\.\w+[^,)]*?(\w+_param_\d+)", text)
        self.barriers = len(re.findall(r"mbarrier\.init", text))
        self._has_groups = "wgmma" in text
        self.has_tensor_memory = "tcgen05" in text
        self._numbers: dict[str, int] = {}
        self._labels: dict[str, int] = {}
        self._runs: list[list[Statement]] = []
        body = text[text.index("{", text.index(".reqntid")) + 1 :].partition("$L__func_end")[0]
        self._read(body)
        self._check_wait()
        self.code = [self._function(number) for number in range(len(self._runs))]
        self._passed: list[set[int]] = []

    def _read(self, body: str) -> None:
        """Divide into runs. Names within inner braces are their own, and get the braces' number."""
        run: list[Statement] = []
        inner = opened = 0
        plain = re.sub(r"//.*|\.(loc|file|reg|pragma)\b.*", "", body)
        # labels and braces have lines of their own, and nothing that ends them
        for line in re.sub(r"(?m)^\s*([{}]|[\w$]+:)", r";\1;", plain).split(";"):
            text = re.sub(r"\s+", " ", line).strip()
            if inner:
                text = re.sub(r"(?<![\w.%$])(complete|waitLoop|skipWait)\b", rf"\1_{inner}", text)
            if text in ("{", "}"):
                opened += text == "{"
                inner = opened if text == "{" else 0
            elif text.startswith("$L__tmp"):
                # for debuggers
                continue
            elif text.endswith(":"):
                if run:
                    self._runs.append(run)
                    run = []
                self._labels[text[:-1]] = len(self._runs)
            elif text:
                run.append(Statement.read(text))
                if ENDS.match(run[-1].opcode):
                    self._runs.append(run)
                    run = []
        self._runs.append([*run, Statement("ret", [], None)])

    def _check_wait(self) -> None:
        """See that a kernel which may begin before the one ahead is done waits for it first."""
        opcodes = [statement.opcode for run in self._runs for statement in run]
        if not any(one.startswith("griddepcontrol") for one in opcodes):
            return
        for opcode in opcodes:
            if opcode == "griddepcontrol.wait":
                return
            if TOUCHES.match(opcode):
                raise ValueError(f"{self.name}: {opcode} before the kernel ahead is done")

    def registers(self) -> list[Any]:
        """A warp's registers before the first instruction: nothing that means anything."""
        return [BAD[_kind(name)] for name in self._numbers]

    def meeting_point(self, number: int) -> int:
        """The nearest run that every way on from this one passes, whichever branch is taken."""
        end = len(self._runs)
        if not self._passed:
            following = [self._following(at) for at in range(end)]
            self._passed = [set(range(end + 1)) for _ in range(end)] + [{end}]
            changed = True
            while changed:
                changed = False
                for at in reversed(range(end)):
                    passed = {at}.union(
                        set.intersection(*(self._passed[after] for after in following[at]))
                    )
                    changed |= passed != self._passed[at]
                    self._passed[at] = passed
        return max(self._passed[number] - {number}, key=lambda at: len(self._passed[at]))

    def _following(self, number: int) -> list[int]:
        last = self._runs[number][-1]
        if last.opcode == "ret":
            return [len(self._runs)]
        target = [self._labels[last.operands[0]]] if last.opcode.startswith("bra") else []
        return target if target and last.predicate is None else [*target, number + 1]

    def _function(self, number: int) -> Callable[[Any], Any]:
        lines = ["def run(warp):", "  R, block = warp.registers, warp.block"]
        names: dict[str, Any] = dict(globals())
        # lines between products of warp groups
        between: list[str] = []

        def divide() -> None:
            if between and self._has_groups:
                read, written = f"READ{len(lines)}", f"WRITTEN{len(lines)}"
                names[read], names[written] = used_registers(between)
                lines.append(f"  warp.touch({read}, {written})")
            lines.extend(f"  {line}" for line in between)
            between.clear()

        for statement in self._runs[number]:
            try:
                translated = self._lines(statement, number + 1)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                written = f"{statement.opcode} {', '.join(statement.operands)}"
                raise NotImplementedError(f"{self.name}: {written}") from error
            if statement.opcode.startswith("wgmma"):
                divide()
                lines += [f"  {line}" for line in translated]
            else:
                between += translated
        divide()
        exec("\n".join([*lines, f"  return {number + 1}"]), names)
        run: Callable[[Any], Any] = names["run"]
        return run

    def _number(self, name: str) -> int:
        return self._numbers.setdefault(name, len(self._numbers))

    def _source(self, operand: str, kind: str) -> str:
        """An expression for an operand, seen as a type."""
        if SPECIAL.fullmatch(operand):
            return f"warp.special[{operand!r}]"
        if operand.startswith("global_smem"):
            return f"{NUMPY[kind]}({operand.partition('+')[2] or 0})"
        if REGISTER.fullmatch(operand):
            register = f"R[{self._number(operand)}]"
            is_bits = kind == "pred" or kind[0] in "bu"
            return register if is_bits else f"{register}.view({NUMPY[kind]})"
        if kind == "pred":
            return str(bool(int(operand)))
        if operand.startswith("0f"):
            return f"U32({int(operand[2:], 16)}).view({NUMPY[kind]})"
        width = int(kind[1:])
        value = int(operand, 0) % (1 << width)
        if kind[0] == "s" and value >> (width - 1):
            value -= 1 << width
        return f"{NUMPY[kind]}({value})"

    def _address(self, operand: str) -> str:
        """An expression for the addresses of [register + number]."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        if base == "global_smem":
            return f"np.full(32, {offset or 0})"
        if not REGISTER.fullmatch(base):
            raise ValueError(operand)
        register = f"R[{self._number(base)}].astype(I64)"
        return f"{register} + {offset}" if int(offset or 0) else register

    def _store(self, register: str, expression: str, guard: str | None) -> list[str]:
        if register == "_":
            return []
        at = f"R[{self._number(register)}]"
        return [f"{at} = as_{_kind(register)}({expression}, {at}, {guard})"]

    def _lines(self, statement: Statement, following: int) -> list[str]:
        opcode, operands, predicate = statement
        guard = None if predicate is None else self._guard(predicate)
        threads = "warp.active" if guard is None else f"({guard} & warp.active)"
        kind, *rest = opcode.split(".")
        if guard is not None and kind in UNGUARDED:
            raise ValueError(f"{opcode} of some threads")
        special = getattr(self, f"_{kind}", None)
        if special:
            lines: list[str] = special(opcode, operands, threads, guard, following)
            return lines
        if rest[-1] == "f32x2" or (len(rest) > 1 and rest[-2] == "f32"):
            return self._floats(kind, rest, operands, guard)
        last = rest[-1]
        two = f"{kind}.{rest[0]}"
        name = two if two in FORMULAS else kind
        formula = FORMULAS[name]
        said = set(rest[name.count(".") : -1])
        if kind == "redux":
            said -= set(REDUCTIONS)
        if not said <= MODIFIERS or last not in (*NUMPY, "pred"):
            raise ValueError(opcode)
        target, *sources = operands
        if name in ("min", "max") and last == "f32" and "NaN" not in rest:
            formula = f"np.f{name}({{0}}, {{1}})"
            if len(sources) == 3:
                formula = f"np.f{name}({formula}, {{2}})"
        if kind in ("shfl", "redux", "vote"):
            # the last says which threads take part: all
            sources.pop()
        if kind == "shfl" and sources.pop() != ("0" if "up" in rest else "31"):
            raise ValueError("segments of a warp")
        if len(sources) != len(set(re.findall(r"\{(\d)\}", formula))):
            raise ValueError(opcode)
        kinds = OPERANDS.get(name, ())
        types = [
            (kinds[at] if at < len(kinds) and kinds[at] else last) for at in range(len(sources))
        ]
        types = [f"{last[0]}64" if one == "64" else one for one in types]
        mode = REDUCTIONS[rest[1]] if kind == "redux" else rest[1] if kind == "shfl" else ""
        values = [self._source(*one) for one in zip(sources, types, strict=True)]
        return self._store(target, formula.format(*values, mode=mode), guard)

    def _floats(
        self, kind: str, rest: list[str], operands: list[str], guard: str | None
    ) -> list[str]:
        """Two float32 in a register of 64 bits, or float32 with factors and terms of 16 bits."""
        target, *sources = operands
        if not set(rest[:-1]) <= {"rn", "f32"} or kind not in ("add", "sub", "mul", "fma"):
            raise ValueError(rest)
        if rest[-1] == "f32x2":
            values = [f"{self._source(one, 'b64')}.view(F32)" for one in sources]
            return self._store(target, f"({FORMULAS[kind].format(*values)}).view(U64)", guard)
        narrow = {"add": 1, "sub": 1, "fma": 2}[kind]
        widen = CONVERSIONS[f"f32.{rest[-1]}"]
        values = [widen.format(self._source(one, "b16")) for one in sources[:narrow]]
        values += [self._source(one, "f32") for one in sources[narrow:]]
        return self._store(target, FORMULAS[kind].format(*values), guard)

    def _guard(self, predicate: str) -> str:
        register = self._source(predicate.lstrip("!"), "pred")
        return f"~{register}" if predicate.startswith("!") else register

    def _bra(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        guard, following = rest[1:]
        target = self._labels[operands[0]]
        if guard is None:
            return [f"return {target}"]
        return [f"return warp.branch({guard}, {target}, {following})"]

    def _ret(self, *rest: Any) -> list[str]:
        return ["return -1"]

    def _bar(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        if opcode == "bar.warp.sync":
            return []
        if opcode not in ("bar.sync", "barrier.sync"):
            raise ValueError(opcode)
        return [f"return 'barrier', {operands[0]}, {(*operands, 0)[1]}, {rest[-1]}"]

    _barrier = _bar

    def _nothing(self, *rest: Any) -> list[str]:
        return []

    # how many registers a warp has is not modelled, nor kernels beside each other
    _setmaxnreg = _griddepcontrol = _nothing

    def _fence(self, opcode: str, operands: list[str], threads: str, *rest: Any) -> list[str]:
        if opcode.startswith("fence.proxy.tensormap"):
            return [f"block.fence_map(warp, {self._address(operands[0])}, {threads})"]
        if not opcode.startswith("fence.proxy.async") or rest[0] is not None:
            raise ValueError(opcode)
        return ["block.fence(warp)"]

    def _mov(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        (target, source), guard, kind = operands, rest[1], opcode.split(".")[1]
        half = f"b{int(kind[1:]) // 2}" if kind != "pred" else kind
        if target.startswith("{"):
            whole, bits = self._source(source, kind), int(half[1:])
            return [
                line
                for at, part in enumerate(vector(target))
                for line in self._store(part, f"{whole} >> {NUMPY[kind]}({bits * at})", guard)
            ]
        if source.startswith("{"):
            low, high = (self._source(part, half) for part in vector(source))
            joined = f"as_{kind}({low}) | as_{kind}({high}) << {NUMPY[kind]}({half[1:]})"
            return self._store(target, joined, guard)
        return self._store(target, self._source(source, kind), guard)

    def _cvt(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        to, of = opcode.split(".")[-2:]
        target, *sources = operands
        if f"{to}.{of}" in CONVERSIONS:
            formula, kind = CONVERSIONS[f"{to}.{of}"], {"f16": "b16", "bf16": "b16"}.get(of, of)
        else:
            formula, kind = f"{{0}}.astype({NUMPY[to]})", of
            if of == "f32":
                raise ValueError("rounds to whole numbers")
        values = [self._source(one, kind) for one in sources]
        return self._store(target, formula.format(*values), rest[1])

    def _elect(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        leader, chosen = operands[0].split("|")
        first = "np.flatnonzero(warp.active)[0]"
        lines = self._store(leader, f"U32({first})", None)
        return lines + self._store(chosen, f"LANES == {first}", None)

    def _ld(self, opcode: str, operands: list[str], threads: str, *rest: Any) -> list[str]:
        _, space, *_, kind = opcode.replace("::cta", "").split(".")
        target, source = operands
        if space == "param":
            return self._store(target, f"U64(block.parameters[{source[1:-1]!r}])", None)
        targets = vector(target)
        size = int(kind[1:]) // 8
        warp = "warp, " if space == "shared" else ""
        at = self._address(source)
        lines = [f"D = block.load_{space}({warp}{at}, {size * len(targets)}, {threads})"]
        for at, one in enumerate(targets):
            value = f"D[:, {at * size}:{at * size + size}].copy().view({NUMPY[kind]})[:, 0]"
            lines += self._store(one, value, rest[0])
        return lines

    def _st(self, opcode: str, operands: list[str], threads: str, *rest: Any) -> list[str]:
        _, space, *_, kind = opcode.replace("::cta", "").split(".")
        target, source = operands
        values = ", ".join(
            f"octets({self._source(one, kind)}, {NUMPY[kind]})" for one in vector(source)
        )
        return [f"block.store_{space}(warp, {self._address(target)}, [{values}], {threads})"]

    def _ldmatrix(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        targets = vector(operands[0])
        transposed = ".trans" in opcode
        rows = self._address(operands[1])
        lines = [f"D = block.ldmatrix(warp, {rows}, {len(targets)}, {transposed})"]
        return lines + [
            line for at, one in enumerate(targets) for line in self._store(one, f"D[{at}]", None)
        ]

    def _stmatrix(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        values = ", ".join(self._source(one, "b32") for one in vector(operands[1]))
        return [
            f"block.stmatrix(warp, {self._address(operands[0])}, [{values}], {'.trans' in opcode})"
        ]

    def _cp(self, opcode: str, operands: list[str], threads: str, *rest: Any) -> list[str]:
        if opcode.startswith("cp.async.bulk.tensor.2d.shared"):
            descriptor, place = split(operands[1][1:-1])
            column, row = (self._source(one, "s32") for one in vector(place))
            to, told = self._address(operands[0]), self._address(operands[2])
            of = f"R[{self._number(descriptor)}], {column}, {row}"
            return [f"block.copy_tensor(warp, {to}, {of}, {told}, {threads})"]
        if opcode in ("cp.async.bulk.commit_group", "cp.async.bulk.wait_group.read"):
            # of stores that no kernel here makes
            return []
        if opcode == "cp.async.commit_group":
            return ["warp.copies.commit()"]
        if opcode == "cp.async.wait_group":
            return [f"warp.copies.wait({operands[0]})"]
        if not opcode.startswith(("cp.async.cg.shared.global", "cp.async.ca.shared.global")):
            raise ValueError(opcode)
        to, of = self._address(operands[0]), self._address(operands[1])
        size = int(operands[2], 0)
        given = self._source(operands[3], "b32") if len(operands) > 3 else f"U32({size})"
        return [f"block.copy(warp, {to}, {of}, {size}, {given}, {threads})"]

    def _tensormap(self, opcode: str, operands: list[str], threads: str, *rest: Any) -> list[str]:
        if opcode.startswith("tensormap.replace.tile."):
            kind = "b64" if opcode.endswith("b64") else "b32"
            *place, value = operands[1:]
            key = (opcode.split(".")[3], *(int(one, 0) for one in place))
            where = self._address(operands[0])
            return [f"block.describe(warp, {where}, {key}, {self._source(value, kind)}, {threads})"]
        of, to = self._address(operands[1]), self._address(operands[0])
        return [f"block.publish(warp, {of}, {to}, {threads})"]

    def _mbarrier(self, opcode: str, operands: list[str], threads: str, *rest: Any) -> list[str]:
        action = opcode.split(".")[1]
        if action == "init":
            return [f"block.init(warp, {self._address(operands[0])}, {operands[1]}, {threads})"]
        if action == "inval":
            return [f"block.forget(warp, {self._address(operands[0])}, {threads})"]
        if action == "arrive":
            to, amount = self._address(operands[1]), (*operands, 1)[2]
            return [f"block.arrive(warp, {to}, {amount}, {'expect_tx' in opcode}, {threads})"]
        if action != "try_wait":
            raise ValueError(opcode)
        at, parity = self._address(operands[1]), self._source(operands[2], "b32")
        done = f"block.passed(warp, {at}, {parity})"
        complete = f"R[{self._number(operands[0])}]"
        return [f"{complete} = np.full(32, {done})", f"return 'try', {complete}[0], {rest[-1]}"]

    def _mma(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        kind = opcode.split(".")[-2]
        target, *sources = (vector(one) for one in operands)
        types = ("b32", "b32", "f32")
        a, b, c = (
            ", ".join(self._source(one, kind) for one in source)
            for source, kind in zip(sources, types, strict=True)
        )
        lines = [f"D = multiply({kind!r}, [{a}], [{b}], [{c}])"]
        return lines + [
            line for at, one in enumerate(target) for line in self._store(one, f"D[{at}]", None)
        ]

    def _wgmma(self, opcode: str, operands: list[str], *rest: Any) -> list[str]:
        action = opcode.split(".")[1]
        if action == "fence":
            return ["warp.fence_products()"]
        if action == "commit_group":
            return ["warp.products.commit()"]
        if action == "wait_group":
            return [f"warp.wait_products({operands[0]})"]
        width, inner, kind = re.findall(r"m64n(\d+)k(\d+)\.f32\.(\w+)\.", opcode)[0]
        target, a, b, scale, scale_a, scale_b, *transposed = operands
        if (scale_a, scale_b) != ("1", "1"):
            raise ValueError(opcode)
        into = [self._number(one) for one in vector(target)]
        of = [self._number(one) for one in vector(a)] if a.startswith("{") else self._number(a)
        is_transposed = [one == "1" for one in transposed]
        # one in registers cannot be transposed, and is not said to be
        if a.startswith("{"):
            is_transposed.insert(0, False)
        is_a, is_b = (*is_transposed, False, False)[:2]
        return [
            f"block.multiply_group(warp, {into}, {of}, R[{self._number(b)}], "
            f"{self._source(scale, 'pred')}, {width}, {inner}, {kind!r}, ({is_a}, {is_b}))"
        ]

    def _tcgen05(self, opcode: str, operands: list[str], threads: str, *rest: Any) -> list[str]:
        _, action, *said = opcode.split(".")
        if action == "relinquish_alloc_permit":
            return []
        if action.startswith("wait::"):
            return [f"block.wait_tensor_{action[6:]}(warp)"]
        if action == "alloc":
            at = self._address(operands[0])
            return [f"block.allocate(warp, {at}, {operands[1]}, {threads})"]
        if action == "dealloc":
            return [f"block.deallocate(warp, {threads})"]
        if action == "commit":
            return [f"block.commit_products(warp, {self._address(operands[0])}, {threads})"]
        if action in ("ld", "st"):
            shape, repeats = said[2:4]
            outer, first = operands[0], operands[-1]
            at, registers = (first, outer) if action == "ld" else (outer, first)
            if shape == "16x32bx2":
                # the second half of a warp has columns further on
                at = operands[1] if action == "ld" else outer
                split_at = operands[2] if action == "ld" else operands[1]
            elif shape == "32x32b":
                split_at = "None"
            else:
                raise ValueError(opcode)
            numbers = [self._number(one) for one in vector(registers)]
            if repeats != f"x{len(numbers)}":
                raise ValueError(opcode)
            lines = [
                f"block.{'load' if action == 'ld' else 'store'}_tensor("
                f"warp, {numbers}, {self._address(at)}, {split_at}, {threads})"
            ]
            return lines
        if action != "mma" or said[0] != "cta_group::1":
            raise ValueError(opcode)
        into, a, b, description, adds = operands
        is_stored = a.startswith("[")
        of_a = self._address(a) if is_stored else self._source(a, "b64")
        return [
            f"block.multiply_tensor(warp, {self._address(into)}, {of_a}, {is_stored}, "
            f"{self._source(b, 'b64')}, {self._source(description, 'b32')}, "
            f"{self._source(adds, 'pred')}, {said[1][6:]!r}, {threads})"
        ]


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise NotImplementedError(f"no {pattern} in the assembly")
    return match[1]


def _kind(register: str) -> str:
    """A register's type, by its name."""
    return next((kind for name, kind in REGISTERS.items() if register.startswith(name)), "pred")


def used_registers(lines: list[str]) -> tuple[frozenset[int], frozenset[int]]:
    """The registers that translated instructions read, and those that they write."""
    text = "\n".join(lines)
    written = re.findall(r"(?m)^R\[(\d+)\] =", text)
    read = re.findall(r"R\[(\d+)\](?! =)", text)
    return frozenset(map(int, read)), frozenset(map(int, written))


def split(operands: str) -> list[str]:
    """Divide at the commas outside of brackets."""
    return [one.strip() for one in re.findall(r"(?:\[[^]]*\]|\{[^}]*\}|[^,])+", operands)]


def vector(operand: str) -> list[str]:
    """The registers of {a, b}, or the one."""
    return [one.strip() for one in operand.strip("{} ").split(",")]


def as_bits(x: Any, dtype: Any, old: Any, guard: Any) -> Any:
    """Numbers as a register keeps them; threads that the guard leaves out keep what they have."""
    bits = np.asarray(x)
    if bits.dtype.itemsize != dtype().itemsize:
        is_signed = bits.dtype.kind == "i"
        bits = bits.astype(np.dtype(f"i{dtype().itemsize}") if is_signed else dtype)
    bits = bits.view(dtype)
    if bits.shape != (32,):
        bits = np.full(32, bits)
    if guard is None:
        return bits
    return np.where(guard, bits, old)


def as_b16(x: Any, old: Any = None, guard: Any = None) -> Any:
    return as_bits(x, U16, old, guard)


def as_b32(x: Any, old: Any = None, guard: Any = None) -> Any:
    return as_bits(x, U32, old, guard)


def as_b64(x: Any, old: Any = None, guard: Any = None) -> Any:
    return as_bits(x, U64, old, guard)


def as_pred(x: Any, old: Any = None, guard: Any = None) -> Any:
    truth = x if np.shape(x) == (32,) else np.full(32, x, bool)
    return truth if guard is None else np.where(guard, truth, old)


def octets(x: Any, dtype: Any) -> Any:
    """The bytes of each thread's number, (32, size)."""
    numbers = np.full(32, x, dtype) if np.shape(x) != (32,) else x.astype(dtype)
    return numbers[:, None].view(U8)


def unordered(a: Any, b: Any) -> Any:
    return (a != a) | (b != b)


def double_width(x: Any) -> Any:
    return x.astype(I64 if x.dtype.kind == "i" else U64)


def high_half(a: Any, b: Any) -> Any:
    if a.dtype.itemsize == 4:
        return ((double_width(a) * double_width(b)) >> 32).astype(a.dtype)
    pairs = zip(np.broadcast_to(a, 32), np.broadcast_to(b, 32), strict=True)
    return np.array([(int(x) * int(y)) >> 64 for x, y in pairs], a.dtype)


def shift(way: Any, x: Any, by: Any) -> Any:
    """A shift by the width or more leaves nothing, or the sign."""
    width = x.dtype.itemsize * 8
    shifted = way(x, np.minimum(by, width - 1).astype(x.dtype))
    return np.where(by < width, shifted, shifted if x.dtype.kind == "i" else x.dtype.type(0))


def bits_of(x: Any, first: Any, count: Any) -> Any:
    """Bits first to first + count, the highest as the sign of a signed number."""
    width = x.dtype.itemsize * 8
    if count == 0 or first + count > width:
        raise NotImplementedError(f"bits {first} to {first + count} of {width}")
    above = (width - first - count).astype(x.dtype)
    return (x << above) >> (width - count).astype(x.dtype)


def shuffle(x: Any, by: Any, mode: str) -> Any:
    """Each thread's number from another one's; from its own where there is none."""
    if mode == "bfly":
        return x[LANES ^ (by & 31)]
    others = {"idx": (by & 31) + 0 * LANES, "up": LANES - by, "down": LANES + by}[mode]
    return x[np.where((others < 0) | (others > 31), LANES, others)]


def half(x: Any) -> Any:
    return x.astype(F16).view(U16)


def bfloat(x: Any) -> Any:
    bits = x.view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FFF), rounded).astype(U16)


def pair(low: Any, high: Any) -> Any:
    return low.astype(U32) | high.astype(U32) << U32(16)


def nearest_tf32(bits: Any) -> Any:
    """float32 of a ten-bit fraction, halves away from zero."""
    rounded = (bits + U32(0x1000)) & U32(0xFFFFE000)
    return np.where(np.isfinite(bits.view(F32)), rounded, bits)


def numbers_of(bits: Any, kind: str) -> Any:
    """Operands of a tensor core as float32; tf32 is what the hardware reads of a float32."""
    if kind == "tf32":
        return (bits.view(U32) & U32(0xFFFFE000)).view(F32)
    if kind == "f16":
        return bits.view(F16).astype(F32)
    return (bits.view(U16).astype(U32) << U32(16)).view(F32)


# where a thread's numbers lie in tiles of 8 rows, two neighbours or one to each thread
ROW, COLUMN = LANES // 4, LANES % 4
HALVES = ((0, 0), (1, 0), (0, 1), (1, 1))


def fragment(registers: list[Any], kind: str, places: Any) -> Any:
    """The matrix that 32 threads hold in tiles of 8 rows and 16 bytes, a register each."""
    rows, columns = (max(place[axis] for place in places) + 1 for axis in (0, 1))
    wide = 4 if kind == "tf32" else 8
    matrix = np.empty((8 * rows, wide * columns), F32)
    for bits, (row, column) in zip(registers, places, strict=True):
        tile = numbers_of(np.ascontiguousarray(bits), kind).reshape(8, wide)
        matrix[8 * row : 8 * row + 8, wide * column : wide * column + wide] = tile
    return matrix


def multiply(kind: str, a: list[Any], b: list[Any], c: list[Any]) -> list[Any]:
    """mma.sync: (16, K) times (8, K) transposed, plus (16, 8)."""
    product = fragment(a, kind, HALVES) @ fragment(b, kind, ((0, 0), (0, 1))).T
    return [
        (c[at] + product[ROW + at // 2 * 8, COLUMN * 2 + at % 2]).astype(F32) for at in range(4)
    ]
