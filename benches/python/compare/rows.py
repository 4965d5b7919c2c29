"""The rows of the final table: what is to be reached, and what the cells say of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from compare.cell import Cell

FASTEST = "avx512"

#: A share of the read bandwidth above this says that the bandwidth moved within the cell.
IMPOSSIBLE = 1.1


@dataclass(frozen=True)
class Row:
    """One line: `values` by shape must be at least (or at most) `bound`."""

    section: str
    work: str
    values: dict[str, float]
    bound: float
    unit: str
    at_least: bool = True
    peer: str = ""
    note: str = ""
    doubt: bool = False

    @property
    def verdict(self) -> str:
        """By the worst of the values."""
        if not self.values:
            return self.note or "not measured"
        if (self.unit.endswith("r") and max(self.values.values()) > IMPOSSIBLE) or self.doubt:
            return "unsure: above what the memory gives"
        worst = min(self.values.values()) if self.at_least else max(self.values.values())
        short_of = worst < self.bound if self.at_least else worst > self.bound
        return "missed" if short_of else "met"

    @property
    def target(self) -> str:
        """For instance `>= 0.93 r`."""
        return f"{'>=' if self.at_least else '<='} {self.bound:g} {self.unit}"


def rows(cells: Sequence[Cell], e2e: Sequence[dict[str, Any]] = ()) -> list[Row]:
    """All rows, in the order of the sections."""
    table = Table(cells)
    made = [*_decode(table), *_few(table), *_many(table), *_gradients(table)]
    made += [*_int8_activations(table), *_llm_int8(table), *_codec(table), *_isa(table)]
    return [*made, *_overhead(table), *_models(e2e)]


class Table:
    """Finds cells by what they are."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.cells = cells

    def find(self, package: str = "nybble", **of: Any) -> list[Cell]:
        """Cells of a package with these attributes."""
        return [
            cell
            for cell in self.cells
            if cell.package == package
            and all(getattr(cell, name) == value for name, value in of.items())
        ]

    def by_shape(self, ratio: Callable[[Cell], float | None], **of: Any) -> dict[str, float]:
        """The ratio of each cell, by shape."""
        pairs = ((cell.shape, ratio(cell)) for cell in self.find(**of))
        return {shape: value for shape, value in pairs if value is not None}

    def best_peer(self, of_cell: Callable[[Cell], str], **of: Any) -> str:
        """The quickest cell of another library that is not a dense product."""
        others = [
            cell
            for cell in self.cells
            if cell.package != "nybble"
            and cell.name not in ("torch bf16", "torch fp32", "torch int8 dynamic")
            and all(getattr(cell, name) == value for name, value in of.items())
        ]
        if not others:
            return ""
        best = min(others, key=lambda cell: cell.seconds)
        return f"{best.name}: {of_cell(best)}"


def _of_read(cell: Cell) -> float:
    return cell.of_read


def _decode(table: Table) -> Iterator[Row]:
    def says(cell: Cell) -> str:
        return f"{cell.of_read:.2f} r, {cell.seconds * 1e6:.0f} us"

    for threads, bound in ((2, 0.93), (1, 0.88)):
        of: dict[str, Any] = {"section": "products", "m": 1, "threads": threads}
        peer = table.best_peer(says, shape="4096x4096", **of)
        for format in ("nf4", "nf4 nested", "fp4", "fp4 nested", "int4", "int4 nested", "mxfp4"):
            for dtype in ("bf16", "fp16"):
                values = table.by_shape(_of_read, name=format, dtype=dtype, **of)
                work = f"M=1, {format}, {dtype}, {threads} threads"
                yield Row("products", work, values, bound, "r", peer=peer)
        for format in ("nf4", "nf4 nested") if threads == 2 else ():
            values = table.by_shape(_of_read, name=format, dtype="fp32", **of)
            yield Row("products", f"M=1, {format}, fp32", values, 0.8, "r", peer=peer)


def _few(table: Table) -> Iterator[Row]:
    for format in ("nf4", "nf4 nested", "fp4", "int4"):
        for dtype in ("bf16", "fp16", "fp32") if format == "nf4" else ("bf16",):
            of: dict[str, Any] = {"section": "products", "threads": 2, "dtype": dtype}
            one = {cell.shape: cell.seconds for cell in table.find(m=1, name=format, **of)}
            values = table.by_shape(_over(one), m=4, name=format, **of)
            peer = table.best_peer(
                lambda cell: f"{cell.seconds * 1e6:.0f} us", section="products", m=4, threads=2,
                shape="4096x4096",
            )  # fmt: skip
            work = f"M=4, {format}, {dtype}, against M=1"
            yield Row("products", work, values, 1.3, "x time", at_least=False, peer=peer)


def _many(table: Table) -> Iterator[Row]:
    of: dict[str, Any] = {"section": "products", "threads": 2}
    for m, bound in ((16, 0.9), (64, 0.9), (512, 1.0)):
        peer = table.best_peer(_of_t16, m=m, shape="4096x4096", **of)
        for dtype in ("bf16", "fp16"):
            values = table.by_shape(
                lambda cell: cell.gflops / cell.t16, m=m, name="nf4", dtype=dtype, **of
            )
            yield Row("products", f"M={m}, nf4, {dtype}", values, bound, "T16", peer=peer)
    values = table.by_shape(
        lambda cell: cell.gflops / cell.t32, m=512, name="nf4", dtype="fp32", **of
    )
    yield Row("products", "M=512, nf4, fp32", values, 0.95, "T32")


def _gradients(table: Table) -> Iterator[Row]:
    for m in (1, 16, 512):
        for dtype in ("bf16", "fp32"):
            of: dict[str, Any] = {"section": "gradients", "m": m, "dtype": dtype}
            base = {cell.shape: cell.seconds for cell in table.find(name="inference", **of)}
            for name in ("training forward", "grad of x"):
                values = table.by_shape(_over(base), name=name, **of)
                if not values:
                    continue
                peers = table.find("bitsandbytes", name=name, **of)
                peer = "".join(
                    f"bitsandbytes: {cell.seconds / base[cell.shape]:.2f}" for cell in peers
                )
                work = f"time of {name}, M={m}, nf4, {dtype}, against inference"
                # The same kernels: a tenth is left for autograd and noise.
                yield Row("gradients", work, values, 1.1, "x time", at_least=False, peer=peer)


def _int8_activations(table: Table) -> Iterator[Row]:
    of: dict[str, Any] = {"section": "products", "threads": 2, "name": "nf4 compute=int8"}
    offered = bool(table.find(**of))
    for m, bound, unit in ((1, 0.93, "r"), (16, 1.5, "T16"), (512, 1.7, "T16")):
        ratio = _of_read if unit == "r" else _t16
        peer = table.best_peer(
            (lambda cell: f"{cell.of_read:.2f} r") if unit == "r" else _of_t16,
            section="products", m=m, threads=2, shape="4096x4096",
        )  # fmt: skip
        values = table.by_shape(ratio, m=m, **of)
        note = "" if offered else "not offered"
        yield Row("products", f'compute="int8", M={m}', values, bound, unit, peer=peer, note=note)


def _llm_int8(table: Table) -> Iterator[Row]:
    of: dict[str, Any] = {"section": "llm_int8"}
    for m, bound in ((1, 0.62), (4, 0.14), (16, 0.18), (512, 0.8)):
        theirs = {
            cell.shape: cell.seconds
            for cell in table.find(
                "bitsandbytes", m=m, name="bitsandbytes Linear8bitLt threshold 0", **of
            )
        }
        values = table.by_shape(_over(theirs), m=m, name="Linear8bit threshold 0", **of)
        peer = "".join(
            f"torch int8 dynamic: {cell.seconds / theirs[cell.shape]:.2f}"
            for cell in table.find("torch", m=m, name="torch int8 dynamic", **of)
            if cell.shape in theirs
        )
        work = f"LLM.int8, M={m}, against bitsandbytes"
        yield Row("llm_int8", work, values, bound, "x time", at_least=False, peer=peer)
    for m in (1, 4, 16, 512):
        name = "Linear8bit threshold 6"
        base = {cell.shape: cell.seconds for cell in table.find(m=m, name=name, **of)}
        values = table.by_shape(_over(base), m=m, name=f"{name}, 0.5 % outliers", **of)
        peer = ""
        foreign = f"bitsandbytes Linear8bitLt threshold {6}"
        plain = table.find("bitsandbytes", m=m, name=foreign, **of)
        some = table.find("bitsandbytes", m=m, name=f"{foreign}, 0.5 % outliers", **of)
        if plain and some:
            peer = f"bitsandbytes: {some[0].seconds / plain[0].seconds:.2f}"
        work = f"LLM.int8, threshold 6, 0.5 % outliers, M={m}, against none"
        yield Row("llm_int8", work, values, 1.25, "x time", at_least=False, peer=peer)


def _codec(table: Table) -> Iterator[Row]:
    def says(cell: Cell) -> str:
        return f"{cell.gelem:.3g} Gelem/s"

    for format in ("nf4", "nf4 nested", "fp4", "int4", "dynamic8", "int8"):
        for dtype in ("fp32", "bf16", "fp16"):
            of: dict[str, Any] = {"section": "quantize", "dtype": dtype}
            bound = {"dynamic8": 3.0, "int8": 5.0}.get(format, 5.0 if dtype == "fp32" else 6.5)
            peer = table.best_peer(says, name=format, **of)
            for name in (format, f"{format} out="):
                found = table.find(name=name, **of)
                values = {cell.shape: cell.gelem for cell in found}
                note = "".join(f"{cell.of_read:.2f} of bytes / r" for cell in found)
                if found and any(cell.of_read >= 0.75 for cell in found) and "8" not in format:
                    # The alternative: three quarters of what the memory gives.
                    values, bound = {cell.shape: cell.of_read for cell in found}, 0.75
                    yield Row(
                        "quantize", f"quantize {name}, {dtype}", values, bound, "of bytes / r"
                    )
                elif found:
                    work = f"quantize {name}, {dtype} ({note})"
                    doubt = any(cell.of_read > IMPOSSIBLE for cell in found)
                    yield Row("quantize", work, values, bound, "Gelem/s", peer=peer, doubt=doubt)
    for name, bound in (("nf4 out=", 25.0), ("nf4 fresh", 15.0)):
        of = {"section": "dequantize", "dtype": "bf16", "name": name}
        values = table.by_shape(lambda cell: 2 * cell.gelem, **of)
        peer = table.best_peer(lambda cell: f"{2 * cell.gelem:.1f} GB/s", **of)
        note = "" if values else "not offered"
        work = f"dequantize {name} to bf16"
        yield Row("dequantize", work, values, bound, "GB/s out", peer=peer, note=note)


def _isa(table: Table) -> Iterator[Row]:
    for m, bound in ((1, 0.6), (512, 0.45)):
        for dtype in ("bf16", "fp32"):
            of: dict[str, Any] = {"section": "isa", "m": m, "dtype": dtype}
            # Two processes: each is compared with its own limits.
            ratio = _of_read if m == 1 else (_t16 if dtype == "bf16" else _t32)
            full = table.by_shape(ratio, kernels=FASTEST, **of)
            values = {
                shape: value / full[shape]
                for shape, value in table.by_shape(ratio, kernels="avx2", **of).items()
                if shape in full
            }
            if full or values:
                work = f"AVX2 against AVX-512, M={m}, nf4, {dtype}"
                yield Row("isa", work, values, bound, "x speed")


def _overhead(table: Table) -> Iterator[Row]:
    for name in ("nb.linear nf4", "Linear4bit.forward nf4"):
        values = table.by_shape(lambda cell: cell.seconds * 1e6, section="overhead", name=name)
        empty = table.find("torch", section="overhead", name="empty op")
        theirs = table.find("bitsandbytes", section="overhead")
        note = [f"{cell.name}: {cell.seconds * 1e6:.1f} us" for cell in empty]
        note += [f"bitsandbytes {cell.name}: {cell.seconds * 1e6:.1f} us" for cell in theirs]
        yield Row("overhead", f"whole call, {name}, 64x64, M=1", values, 10, "us",
                  at_least=False, peer="; ".join(note))  # fmt: skip


def _models(results: Iterable[dict[str, Any]]) -> Iterator[Row]:
    by_name = {result["runner"]: result for result in results}
    ours, theirs = by_name.get("nybble nf4"), by_name.get("bitsandbytes nf4")
    for what, bound in (("decode", 1.6), ("prefill", 1.5)):
        if ours is None:
            continue
        key = f"{what}_tokens_per_second"
        others = "; ".join(
            f"{name}: {result[key] / ours[key]:.2f} x ours"
            for name, result in by_name.items()
            if not name.startswith("nybble") and result.get(key)
        )
        values = {"model": ours[key] / theirs[key]} if theirs else {}
        work = f"SmolLM2-135M, nf4, {what}, against bitsandbytes"
        yield Row("e2e", work, values, bound, "x speed", peer=others)


def _over(base: dict[str, float]) -> Callable[[Cell], float | None]:
    """Time as a multiple of that of another cell of the same shape."""
    return lambda cell: cell.seconds / base[cell.shape] if cell.shape in base else None


def _t16(cell: Cell) -> float:
    return cell.gflops / cell.t16


def _t32(cell: Cell) -> float:
    return cell.gflops / cell.t32


def _of_t16(cell: Cell) -> str:
    return f"{_t16(cell):.2f} T16"
