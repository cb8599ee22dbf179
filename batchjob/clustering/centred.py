"""The Gram matrix of one problem's centred rows, in compiled code. Letters: P rows of D numbers."""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from batchjob.clustering.jit import compiled

LANES = 16  # columns of a tile: two vector registers with AVX2, one with AVX-512, four with NEON
ROWS = 4  # rows of a tile: its sums stay in vector registers


@compiled
def centre(x: NDArray[Any], keep: NDArray[np.int64], packed: NDArray[Any]) -> float:
    """Centres the rows of a problem, scales them, and writes them in the order in which `multiply` reads them.

    Parameters
    ----------
    x
        float [P, D].
    keep
        int64 [C]: the numbers of the rows that take part.
    packed
        [⌈C / LANES⌉ · D · LANES], written: panels of LANES rows, each column by column.

    Returns
    -------
    The power of two by which the rows were multiplied. It brings their root mean square length into [0.5, 1), so that
    squares neither overflow nor vanish, and rounds nothing. It is 0 where all rows are equal, and NaN where a row holds
    NaN or infinity; `packed` is then not written.
    """
    count, depth = len(keep), x.shape[1]
    mean = np.zeros(depth, np.float64)
    for i in keep:
        row = x[i]
        for d in range(depth):
            mean[d] += row[d]
    for d in range(depth):
        mean[d] /= count
    energy = 0.0
    for i in keep:
        row = x[i]
        for d in range(depth):
            away = row[d] - mean[d]
            energy += away * away
    if not energy < np.inf:  # the compiler's flags for sums would remove a call of isfinite()
        return np.nan
    if energy == 0.0:
        return 0.0
    factor = 2.0 ** -math.frexp(math.sqrt(energy / count))[1]
    for first in range(0, count, LANES):
        panel = packed[first * depth : (first + LANES) * depth]
        for i in range(LANES):
            if first + i < count:
                row = x[keep[first + i]]
                for d in range(depth):
                    panel[d * LANES + i] = (row[d] - mean[d]) * factor
            else:
                for d in range(depth):
                    panel[d * LANES + i] = 0.0
    return float(factor)


@intrinsic  # type: ignore[untyped-decorator]
def _multiply_tile(context: Any, packed: Any, left: Any, right: Any, depth: Any, out: Any) -> Any:
    """Writes into `out` [ROWS · LANES] the products of the ROWS rows at `left` with the LANES rows at `right`.

    The sums are in vector registers. numba's own loops would keep them in memory: 10 GFLOPS in place of 70 on a core
    with AVX2.
    """
    del context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, target = (context.make_array(signature.args[n])(context, builder, arguments[n]).data for n in (0, 4))
        _, left, right, depth, _ = arguments
        number = context.get_data_type(signature.args[0].dtype)
        vector, index = ir.VectorType(number, LANES), left.type
        size = 4 if isinstance(number, ir.FloatType) else 8
        before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        d, sums = builder.phi(index), [builder.phi(vector) for _ in range(ROWS)]
        step = builder.mul(d, ir.Constant(index, LANES))
        address = builder.bitcast(builder.gep(data, [builder.add(right, step)]), vector.as_pointer())
        columns = builder.load(address, align=size)
        row = builder.gep(data, [builder.add(left, step)])
        undefined, first = ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
        added = []
        for i, total in enumerate(sums):
            one = builder.load(builder.gep(row, [ir.Constant(index, i)]))
            spread = builder.insert_element(undefined, one, ir.Constant(ir.IntType(32), 0))
            spread = builder.shuffle_vector(spread, undefined, first)
            product = builder.fmul(spread, columns, flags=["contract"])
            added.append(builder.fadd(total, product, flags=["contract"]))
        following = builder.add(d, ir.Constant(index, 1))
        for phi, value, start in zip([d, *sums], [following, *added], [0, *[None] * ROWS], strict=True):
            phi.add_incoming(ir.Constant(phi.type, start), before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, depth), loop, after)
        builder.position_at_end(after)
        for i, total in enumerate(added):
            address = builder.bitcast(builder.gep(target, [ir.Constant(index, i * LANES)]), vector.as_pointer())
            builder.store(total, address, align=size)
        return context.get_dummy_value()

    return types.void(packed, types.intp, types.intp, types.intp, out), generate


@compiled
def multiply(packed: NDArray[Any], depth: int, gram: NDArray[Any]) -> None:
    """Multiplies all rows with each other.

    Parameters
    ----------
    packed
        The C rows that `centre` has written.
    depth
        D, at least 1.
    gram
        [C, C], written: the products of all rows.
    """
    count = len(gram)
    tile = np.empty(ROWS * LANES, packed.dtype)
    for i in range(0, count, ROWS):
        for j in range(i // LANES * LANES, count, LANES):
            _multiply_tile(packed, i // LANES * LANES * depth + i % LANES, j * depth, depth, tile)
            for row in range(min(ROWS, count - i)):
                for column in range(min(LANES, count - j)):
                    value = tile[row * LANES + column]
                    gram[i + row, j + column] = value
                    gram[j + column, i + row] = value
