// The one matrix product under all convolutions here. The right operand and the result are in panel layout; the left one is,
// or stands in an image that is read in place (RowStrides, ColumnStrides).
//
// A matrix of `rows` x `columns` is stored as panels of `panel<T>` columns, each panel [rows][panel] without gaps, so
// that a register tile reads and writes contiguous memory whatever the sizes (rows a power of two apart would fall
// into one cache set). Columns are padded to a whole panel with zeros.
#pragma once
#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "cpu/vec.h"

namespace fastgan::cpu::FASTGAN_ISA {

template <class T>
constexpr int panel = 2 * lanes<T>;
// Rows of a tile of V registers: 12 accumulators, V operands and 1 broadcast fill the 16 registers of AVX2. AVX-512 has 32;
// twice the rows take half the reads of B, and of those from the second-level cache half the bytes a cycle.
template <int V>
constexpr int micro_rows = (vector_bytes == 64 ? 24 : 12) / V;
// Sums run in registers over this many terms before they are added to memory. Short runs bound the rounding error,
// which Winograd's transforms amplify; 64 costs about 4 % of the product, 32 twice that.
constexpr int64_t run_length = 64, short_run_length = 32;

template <class T>
constexpr int64_t panels(int64_t columns) {
  return (columns + panel<T> - 1) / panel<T>;
}
template <class T>
constexpr int64_t padded(int64_t columns) {
  return panels<T>(columns) * panel<T>;
}

// From one point's matrix to the next one's, of `rows` rows in `panels` panels: an odd number of panels' rows, for transforms
// write to all points at once, and what lies a power of two apart shares one set of the cache.
template <class T>
constexpr int64_t point_stride(int64_t panels, int64_t rows) {
  return (panels * rows | 1) * panel<T>;
}

// Where the values a(row, k) of a product's left side stand: at row * `row` + k / `segment` * `jump` + k % `segment` * `k`.
// Either rows or columns of A are without gaps.
struct RowStrides {
  int64_t row, segment, jump;
  static constexpr int64_t k = 1;
};
struct ColumnStrides {
  int64_t k, segment, jump;
  static constexpr int64_t row = 1;
};
// In panel layout, panels `jump` apart; transposed, of one panel.
template <class T>
struct PanelStrides {
  int64_t jump;
  static constexpr int64_t row = panel<T>, k = 1, segment = panel<T>;
};
template <class T>
struct TransposedStrides {
  static constexpr int64_t row = 1, k = panel<T>, segment = panel<T>, jump = int64_t{panel<T>} * panel<T>;
};

// One run of one register tile: c[R][V registers] (+)= sum over k < depth of a(row, k) * b[k][V]; rows of b and c are b_k
// and c_row apart. Meanwhile memory brings `bytes` of `next` for each k, where there is any.
template <class T, int R, int V = 2, class At, class Next = std::nullptr_t>
FASTGAN_INLINE void micro_run(const T* a, const At& at, const T* b, int64_t b_k, int64_t depth, T* c, int64_t c_row,
                              bool accumulate, Next next = nullptr, int64_t bytes = 0) {
  Vec<T> sum[R][V] = {};
  for (int64_t outer = 0; outer < depth; outer += at.segment, a += at.jump) {
    int64_t count = std::min<int64_t>(at.segment, depth - outer);
    const T* ak = a;
#pragma GCC unroll 4
    for (int64_t k = 0; k < count; k++, ak += at.k, b += b_k) {
      if constexpr (!std::is_null_pointer_v<Next>) __builtin_prefetch(next), next += bytes;
      Vec<T> bk[V];
      FASTGAN_UNROLL for (int v = 0; v < V; v++) bk[v] = load(b + v * lanes<T>);
      FASTGAN_UNROLL for (int r = 0; r < R; r++) {
        Vec<T> x = splat(ak[r * at.row]);
        FASTGAN_UNROLL for (int v = 0; v < V; v++) sum[r][v] = fma(x, bk[v], sum[r][v]);
      }
    }
  }
  FASTGAN_UNROLL for (int r = 0; r < R; r++, c += c_row) {
    if (accumulate) {
      FASTGAN_UNROLL for (int v = 0; v < V; v++) sum[r][v] += load(c + v * lanes<T>);
    }
    FASTGAN_UNROLL for (int v = 0; v < V; v++) store(c + v * lanes<T>, sum[r][v]);
  }
}

// Calls f with `count` <= most as a constant.
template <int most, class F>
FASTGAN_INLINE void with_rows(int64_t count, const F& f) {
  if constexpr (most > 1) {
    if (count < most) return with_rows<most - 1>(count, f);
  }
  f(std::integral_constant<int, most>());
}

// Memory that is used later, asked for share by share while products are computed: all at once, the processor would wait.
struct Ahead {
  struct Range {
    const char *from, *end;
  };
  Range ranges[4] = {};
  int64_t count = 0, lines = 0, share = 0;

  template <class T>
  void add(const T* from, int64_t n) {
    if (!from || n <= 0) return;
    ranges[count++] = {reinterpret_cast<const char*>(from), reinterpret_cast<const char*>(from + n)};
    lines += n * static_cast<int64_t>(sizeof(T)) / 64 + 1;
  }
  void spread(int64_t calls) { share = lines / calls + 1; }
  void operator()() {
    for (int64_t i = 0; i < share && count > 0; i++) {
      Range& last = ranges[count - 1];
      __builtin_prefetch(last.from, 0, 2);
      last.from += 64;
      if (last.from >= last.end) count--;
    }
  }
};
struct Nothing {
  void operator()() const {}
};
// The same, evenly: so many bytes for each of A's values.
struct Stream {
  const char* from;
  int64_t bytes;
  void operator()() const {}
};

// c (+)= A b for `columns` panels, of V registers: `rows` rows of A, b [columns][depth][panel] with panels `b_stride` apart,
// rows of c c_row and its panels `c_stride` apart; summed in runs of `run`, whole segments of A. A run of A serves all columns
// and a run of a panel of b all rows from the first-level cache. `between` is called before each tile's run. Of b that is `far`,
// beyond the second-level cache, the next run is asked for while the first tiles of this one are multiplied.
template <class T, int V, bool far = false, class At, class Between = Nothing>
FASTGAN_INLINE void multiply_rows(const T* a, const At& at, const T* b, int64_t b_stride, int64_t depth, int64_t run, T* c,
                                  int64_t c_row, int64_t c_stride, int64_t columns, int64_t rows, bool accumulate,
                                  Between&& between = {}) {
  // Equal shares of rows: 32 as 6 + 6 + 5 + 5 + 5 + 5, for a tile of 2 would wait for its own sums.
  constexpr int most = micro_rows<V>;
  int64_t shares = (rows + most - 1) / most, share = rows / std::max<int64_t>(1, shares), larger = rows - share * shares;
  int64_t a_run = run / at.segment * at.jump;
  for (int64_t k = 0; k < depth; k += run, a += a_run, b += run * V * lanes<T>, accumulate = true) {
    for (int64_t j = 0; j < columns; j++) {
      const T *panel_of_b = b + j * b_stride, *next = j + 1 < columns ? panel_of_b + b_stride : b + run * V * lanes<T>;
      int64_t deep = std::min(run, depth - k);
      for (int64_t i = 0, row = 0, count; i < shares; i++, row += count) {
        count = share + (i < larger);
        between();
        with_rows<most>(count, [&](auto R) __attribute__((always_inline)) {
          const T* from = a + row * at.row;
          T* to = c + row * c_row + j * c_stride;
          if constexpr (far) {
            const char* share_of_next = reinterpret_cast<const char*>(i < V ? next + i * deep * lanes<T> : panel_of_b);
            micro_run<T, R(), V>(from, at, panel_of_b, V * lanes<T>, deep, to, c_row, accumulate, share_of_next, vector_bytes);
          } else if constexpr (std::is_same_v<std::remove_cvref_t<Between>, Stream>) {
            const char* share = between.from + (row * depth + k * count) * between.bytes;
            micro_run<T, R(), V>(from, at, panel_of_b, V * lanes<T>, deep, to, c_row, accumulate, share, count * between.bytes);
          } else {
            micro_run<T, R(), V>(from, at, panel_of_b, V * lanes<T>, deep, to, c_row, accumulate);
          }
        });
      }
    }
  }
}

inline int64_t tile_runs(int64_t columns, int64_t rows, int64_t depth, int64_t run) {
  return columns * ((rows + micro_rows<2> - 1) / micro_rows<2>) * ((depth + run - 1) / run);
}

// The same of A in panel layout, its panels `a_stride` apart. One copy for all callers: inlined, its tiles were a quarter of
// what these files take to compile.
template <class T, bool far, class Between>
__attribute__((noinline)) void multiply_panels(const T* a, int64_t a_stride, const T* b, int64_t b_stride, int64_t depth, int64_t run,
                                               T* c, int64_t c_stride, int64_t columns, int64_t rows, bool accumulate, Between& between) {
  multiply_rows<T, 2, far>(a, PanelStrides<T>{a_stride}, b, b_stride, depth, run, c, panel<T>, c_stride, columns, rows, accumulate, between);
}

// A `Stream` of each of two panels: so many bytes for each row.
struct PanelsAhead {
  const char *first, *second;
  int64_t bytes;
};
// c [panel][panel] (+)= a^T b, with a and b one panel [depth][panel] each. Meanwhile memory brings the sums, which are in no
// near cache, and what is `ahead`.
template <class T, int R0 = 0>
void multiply_transposed_run(const T* a, const T* b, int64_t depth, T* c, bool accumulate, const PanelsAhead& ahead) {
  constexpr int left = panel<T> - R0;
  if constexpr (left > 0) {
    // Equal shares: 16 rows as 6 + 5 + 5, never 6 + 6 + 4; 32 as 11 + 11 + 10.
    constexpr int tiles = (left + micro_rows<2> - 1) / micro_rows<2>, R = (left + tiles - 1) / tiles;
    T* sums = c + R0 * panel<T>;
    if (accumulate) {
      FASTGAN_UNROLL for (int r = 0; r < 2 * R; r++) __builtin_prefetch(sums + r * lanes<T>);
    }
    micro_run<T, R>(a + R0, TransposedStrides<T>(), b, panel<T>, depth, sums, panel<T>, accumulate, R0 ? ahead.second : ahead.first,
                    ahead.bytes);
    multiply_transposed_run<T, R0 + R>(a, b, depth, c, accumulate, ahead);
  }
}

template <class T>
void multiply_transposed(const T* a, const T* b, int64_t depth, T* c, bool accumulate, PanelsAhead ahead) {
  for (int64_t k = 0; k < depth; k += run_length) {
    multiply_transposed_run(a + k * panel<T>, b + k * panel<T>, std::min<int64_t>(run_length, depth - k), c, accumulate || k > 0, ahead);
    ahead.first += run_length * ahead.bytes, ahead.second += run_length * ahead.bytes;
  }
}

}  // namespace fastgan::cpu::FASTGAN_ISA
