"""How the products and the scan cut a result into tasks (csrc/common/cut.h), on its own, on the host."""

import ctypes

import pytest
from backends import compile_host

SOURCE = """
#include "csrc/common/cut.h"

extern "C" void cut(const long* rows, const long* columns, long threads, long* out) {
  const auto side = [](const long* of) { return srppo::Side{of[0], of[1], of[2], of[3]}; };
  const srppo::Block block = srppo::cut_for(side(rows), side(columns), threads);
  out[0] = block.rows;
  out[1] = block.columns;
}
"""


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    library = compile_host(SOURCE, tmp_path_factory.mktemp("cut"))

    def call(rows, columns, threads):
        out = (ctypes.c_long * 2)()
        library.cut((ctypes.c_long * 4)(*rows), (ctypes.c_long * 4)(*columns), ctypes.c_long(threads), out)
        return out[0], out[1]

    return call


def turns(extent, size):
    return -(-extent // size)


PRODUCTS = [(rows, columns) for rows in (1, 13, 256, 293, 1024, 2048, 49152) for columns in (1, 40, 576, 2048)]


@pytest.mark.parametrize("threads", [1, 2, 3, 16, 64])
def test_a_product_is_cut_evenly(cut, threads):
    """Blocks are whole tiles, none is larger than allowed, and the thread with most of them has no more to do, packing
    included, than with blocks as large as may be."""
    for m, n in PRODUCTS:
        rows, columns = (m, 336, 14, 8), (n, 1024, 32, 32)
        height, width = cut(rows, columns, threads)
        assert height % 14 == 0 and width % 32 == 0 and 0 < height <= 336 and 0 < width <= 1024

        def busiest(height, width, m=m, n=n):
            return turns(turns(m, height) * turns(n, width), threads) * (height + 8) * (width + 32)

        fewest = (turns(turns(m, turns(m, 336)), 14) * 14, turns(turns(n, turns(n, 1024)), 32) * 32)
        assert busiest(height, width) <= busiest(*fewest)


def test_two_threads_have_as_much_of_2048_rows(cut):
    """Seven blocks, as few as fit, left one of two threads idle for an eighth of the time."""
    height, width = cut((2048, 336, 14, 8), (576, 1024, 32, 32), 2)
    assert (turns(2048, height), turns(576, width)) == (8, 1)
    assert cut((2048, 336, 14, 8), (576, 1024, 32, 32), 1)[0] == 294


def test_few_groups_are_cut_by_rows(cut):
    """A scan of 4 vocabulary groups on 16 threads: one block of rows each would leave 12 threads idle."""
    height, _ = cut((256, 336, 1, 16), (4, 1, 1, 0), 16)
    assert height == 64
    assert cut((0, 336, 1, 16), (4, 1, 1, 0), 16)[0] == 1  # no row: no task, and no division by zero
